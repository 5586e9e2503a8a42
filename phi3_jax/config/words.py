"""What other programs call the keys of a run: words that are understood without a section, and such as only hint.

Scripts and command lines for TRL, transformers, axolotl, LLaMA-Factory, mlx-lm and others give all settings flat:
`--learning_rate 1e-4 --lora_r 8 --bf16`. A name that only one section has is that section's; others are listed here.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import get_args, get_type_hints

from phi3_jax.config import foreign
from phi3_jax.config.names import nearest
from phi3_jax.config.plain import typed
from phi3_jax.system.errors import InputError

Classes = Mapping[str, type]

# What a section's own name stands for, where a value is given in place of keys.
_SECTION_VALUES = {"model": "model.name_or_path", "data": "data.train", "parallel": "parallel.axes"}

# Another word, and the key that it can only mean.
UNDERSTOOD = {
    word: key
    for key, words in {
        "model.name_or_path": "base_model model_id model_name model_name_or_path model_path",
        "model.revision": "revision model_revision",
        "peft.r": "lora_r lora_rank rank",
        "peft.lora_alpha": "alpha",
        "peft.lora_dropout": "dropout",
        "peft.target_modules": "lora_target_modules lora_target target_module",
        "peft.modules_to_save": "lora_modules_to_save",
        "peft.task_type": "lora_task_type",
        "data.train": "dataset dataset_name dataset_path data_path train_data train_dataset train_file train_path",
        "data.eval": "eval_data eval_dataset eval_file val_data val_file validation_file",
        "data.split": "dataset_train_split",
        "data.eval_split": "dataset_test_split",
        "data.streaming": "dataset_streaming",
        "data.max_length": (
            "block_size cutoff_len max_seq_len max_seq_length max_sequence_length model_max_length seq_len seq_length "
            "sequence_len"
        ),
        "training.output_dir": "output out output_path save_dir save_path",
        "training.learning_rate": "lr",
        "training.lr_scheduler_type": "lr_scheduler scheduler",
        "training.num_train_epochs": "epochs num_epochs train_epochs",
        "training.max_steps": "iters num_steps train_steps",
        "training.per_device_train_batch_size": "micro_batch_size per_gpu_train_batch_size",
        "training.per_device_eval_batch_size": "per_gpu_eval_batch_size",
        "training.gradient_accumulation_steps": (
            "gradient_accumulation grad_accum grad_accumulation grad_accumulation_steps grad_accum_steps"
        ),
        "training.gradient_checkpointing": "grad_checkpointing grad_checkpoint",
        "training.optim": "optimizer",
        "training.weight_decay": "wd",
        "training.max_grad_norm": "grad_clip gradient_clipping max_norm",
        "training.resume_from_checkpoint": "resume",
        "logging.run_name": "wandb_run_name",
        "parallel.tensor": "tp tensor_parallel tensor_parallel_size",
    }.items()
    for word in words.split()
}
# Another word whose meaning here is likely, but not beyond doubt: total or per device, steps or a share.
HINTED = {
    word: key
    for key, words in {
        "model.dtype": "bf16 fp16 precision torch_dtype mixed_precision",
        "model.quantization": "load_in_4bit load_in_8bit quant quantize qlora bits",
        "model.attention": "attn_implementation flash_attention",
        "peft.target_modules": "modules lora_modules",
        "data.eval_fraction": "val_set_size val_size validation_split test_size",
        "data.loss_on": "train_on_inputs mask_prompt train_on_prompt train_on_responses_only",
        "data.packing": "sample_packing",
        "training.per_device_train_batch_size": "batch_size train_batch_size bs",
        "training.per_device_eval_batch_size": "eval_batch_size",
        "training.warmup_steps": "warmup",
        "parallel.data": "dp data_parallel num_gpus",
        "parallel.fsdp": "fsdp",
    }.items()
    for word in words.split()
}
# Names that one section has and that mean something else elsewhere.
_DOUBTFUL = {"fsdp"}


def full_key(name: str, classes: Classes) -> str | None:
    """The `section.key` that a name without a section can only mean; None where it has none, or several.

    Example:
        >>> from phi3_jax.config.run import SECTIONS
        >>> [full_key(name, SECTIONS) for name in ("seed", "lora_r", "bf16", "batch_size")]
        ['training.seed', 'peft.r', 'training.bf16', None]
    """
    if name in _DOUBTFUL:
        return None
    if name in UNDERSTOOD:
        return UNDERSTOOD[name]
    if name in _SECTION_VALUES:
        return _SECTION_VALUES[name]
    own = [section for section, keys in _keys(classes).items() if name in keys]
    if own:
        return f"{own[0]}.{name}" if len(own) == 1 else None
    # Where two sections know it, it means the same, or nothing in both.
    return next((f"{section}.{name}" for section in classes if name in foreign.known_names(section)), None)


def is_switch(key: str, classes: Classes) -> bool:
    """Whether `section.key` may be given without a value, which then is true.

    Example:
        >>> from phi3_jax.config.run import SECTIONS
        >>> is_switch("data.packing", SECTIONS), is_switch("data.max_length", SECTIONS)
        (True, False)
    """
    section, _, name = key.partition(".")
    if section not in classes:
        return False
    hint = get_type_hints(classes[section]).get(name)
    if hint is None:  # another library's, of which the types are not known
        return name in foreign.known_names(section)
    return bool in (hint, *get_args(hint))


def placed(raw: Mapping[str, object], classes: Classes) -> dict[str, object]:
    """Nested values, in which what was given without a section stands in its own.

    Args:
        raw: Sections, with other names among them.
        classes: The dataclass of each section.

    Raises:
        InputError: A name is nobody's, or a setting is given twice with different values.

    Example:
        >>> from phi3_jax.config.run import SECTIONS
        >>> placed({"model": "base", "lr": 1e-4, "training": {"seed": 1}}, SECTIONS)
        {'training': {'seed': 1, 'learning_rate': 0.0001}, 'model': {'name_or_path': 'base'}}
    """
    sections: dict[str, object] = {}
    flat: dict[str, object] = {}
    for name, value in raw.items():
        if name in classes and not (name in _SECTION_VALUES and isinstance(value, str)):
            sections[name] = value
        else:
            flat[str(name)] = value
    for name, said in flat.items():
        value = said
        if name == "use_peft":
            value, key = _without_peft(said), "peft.full_finetuning"
        elif (found := full_key(name, classes)) is None:
            raise InputError(_unknown(name, value, classes))
        else:
            key = found
        section, _, own = key.partition(".")
        values = sections.get(section) or {}
        if not isinstance(values, Mapping):
            raise InputError(f"{section} is {values!r}, expected a section of keys and values")
        if own in values and typed(values[own]) != typed(value):
            raise InputError(f"{name} is {said}, but {key} is {values[own]}; leave one out")
        sections[section] = {**values, own: value}
    return sections


def near_key(name: str, classes: Classes) -> str | None:
    """The `section.key` that is worth naming for one that there is not, or for a name without a section.

    Example:
        >>> from phi3_jax.config.run import SECTIONS
        >>> near_key("training.lr", SECTIONS), near_key("data.seed", SECTIONS), near_key("training.foo", SECTIONS)
        ('training.learning_rate', 'training.seed', None)
    """
    section, _, key = name.replace("-", "_").rpartition(".")
    if meant := HINTED.get(key) or UNDERSTOOD.get(key):
        return meant
    own = _keys(classes)
    here = section if section in own else nearest(section, own)
    if here is not None and key in own[here]:
        return f"{here}.{key}"
    exact = [f"{section}.{key}" for section, keys in own.items() if key in keys]
    if exact:
        return exact[0]
    near_in = own if here is None else {here: own[here]}
    near = nearest(key, [key for keys in near_in.values() for key in keys])
    return next((f"{section}.{near}" for section, keys in near_in.items() if near in keys), None)


def _keys(classes: Classes) -> dict[str, list[str]]:
    return {section: [field.name for field in fields(cls)] for section, cls in classes.items()}


def _unknown(name: str, value: object, classes: Classes) -> str:
    if isinstance(value, Mapping):
        kind, near = "section", nearest(name, classes)
    else:
        kind, near = "key", nearest(name, classes) or near_key(name, classes)
    return f"unknown {kind} {name}; " + (f"did you mean {near}?" if near else f"the sections are {', '.join(classes)}")


def _without_peft(value: object) -> bool:
    """What TRL's `use_peft` says of training every weight."""
    text = str(value).lower()
    if text not in ("true", "false"):
        raise InputError(f"use_peft is {value!r}, expected true or false")
    return text == "false"
