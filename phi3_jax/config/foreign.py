"""The argument names of transformers, TRL and PEFT, translated to those of a run.

Scripts for those libraries hold two dictionaries, one for `TrainingArguments` or `SFTConfig` and one
for `LoraConfig`. Most of their keys are this package's own. The others are moved to where their
meaning lives here, refused where they ask for what is not supported, or named as ignored where they
steer what JAX does not have: none is dropped in silence.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import parse_yaml

Sections = dict[str, dict[str, Any]]

RENAMED = {
    "training": {
        "evaluation_strategy": "training.eval_strategy",
        "activation_checkpointing": "training.gradient_checkpointing",
        "run_name": "logging.run_name",
        "max_seq_length": "data.max_length",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "shuffle_dataset": "data.shuffle",
    },
    "model": {
        "model_name_or_path": "model.name_or_path",
        "pretrained_model_name_or_path": "model.name_or_path",
        "model_revision": "model.revision",
        "torch_dtype": "model.dtype",
    },
}

IGNORED = {
    "training": """
        accelerator_config activation_checkpointing_kwargs activation_offloading auto_find_batch_size
        average_tokens_across_devices batch_eval_metrics bf16_full_eval chars_per_token data_seed
        dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_batch_size
        dataset_kwargs dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
        ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed do_train enable_jit_checkpoint
        eval_accumulation_steps eval_do_concat_batches eval_on_start eval_packing eval_use_gather_object
        fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config fsdp_min_num_params
        fsdp_transformer_layer_cls_to_wrap full_determinism gradient_checkpointing_kwargs group_by_length
        half_precision_backend hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
        include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second
        jit_mode_eval length_column_name liger_kernel_config local_rank log_level log_level_replica
        log_on_each_node logging_dir logging_first_step logging_nan_inf_filter mp_parameters no_cuda
        num_of_sequences pad_to_multiple_of pad_token packing_strategy padding_free parallelism_config past_index
        prediction_loss_only project push_to_hub ray_scope remove_unused_columns
        restore_callback_states_from_checkpoint save_on_each_node save_only_model save_safetensors
        skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
        torchdynamo tpu_metrics_debug tpu_num_cores trackio_bucket_id trackio_space_id trackio_static_space_id
        train_sampling_strategy use_cache use_cpu use_ipex use_legacy_prediction_loop use_liger_kernel
        use_mps_device
    """.split(),  # noqa: SIM905
    "model": [
        "attn_implementation",
        "device_map",
        "low_cpu_mem_usage",
        "trust_remote_code",
        "use_cache",
        "use_safetensors",
    ],
}

# Features of PEFT that are not supported, off by default.
PEFT_OFF = """
    alora_invocation_tokens arrow_config corda_config ensure_weight_tying fan_in_fan_out kasa_config
    layer_replication lora_ga_config megatron_config monteclora_config revision target_parameters use_bdlora
    use_qalora velora_config
""".split()  # noqa: SIM905

# Keys that only say what happens here anyway, with the values that do.
ACCEPTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "training": {
        "chat_template_path": (None,),
        "do_predict": (None, False),
        "eos_token": (None,),
        "eval_delay": (None, 0),
        "greater_is_better": (None, False),
        "ignore_data_skip": (None, False),
        "label_names": (None,),
        "logging_strategy": ("steps",),
        "loss_type": (None, "nll"),
        "lr_scheduler_kwargs": (None, {}),
        "metric_for_best_model": (None, "loss", "eval_loss"),
        "model_init_kwargs": (None, {}),
        "optim_args": (None, ""),
        "optim_target_modules": (None,),
        "truncation_mode": (None, "keep_start"),
    },
    "peft": {name: (None, False, {}, []) for name in PEFT_OFF},
}

# Names of BitsAndBytesConfig and of TRL's ModelConfig, and those among them that steer nothing here.
BNB_NAMES = """
    quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant
    use_bnb_nested_quant bnb_4bit_compute_dtype bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules
    llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
""".split()  # noqa: SIM905
BNB_IGNORED = ("bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload")

# What PEFT writes down about a file or its own workings, and settings of features that are off.
PEFT_BOOKKEEPING = [
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
]

_UNPAGED = "its state is not paged to the host's memory here"

# transformers' `optim` values for what the optimizers here do, with a line where something differs. The
# others that it has are refused: they are other optimizers, or round their states otherwise.
OPTIMIZERS: dict[str, tuple[str, str | None]] = {
    "adamw_torch": ("adamw", None),
    "adamw_torch_fused": ("adamw", None),
    "adamw_torch_xla": ("adamw", None),
    "adamw_torch_npu_fused": ("adamw", None),
    "adamw_apex_fused": ("adamw", None),
    "adamw_anyprecision": ("adamw", None),  # all in float32, unless optim_args ask for another type
    "adamw_hf": ("adamw", "PyTorch's AdamW is used, which corrects the bias before epsilon is added"),
    "paged_adamw_32bit": ("adamw", _UNPAGED),
    "adamw_8bit": ("adamw_8bit", None),
    "adamw_bnb_8bit": ("adamw_8bit", None),
    "paged_adamw_8bit": ("adamw_8bit", _UNPAGED),
    "adamw_torch_8bit": ("adamw_8bit", "bitsandbytes' rules say which states have 8 bits, not torchao's"),
    "adafactor": ("adafactor", None),
    "lion_32bit": ("lion", None),
    "paged_lion_32bit": ("lion", _UNPAGED),
    "sgd": ("sgd", None),
}


def known_names(section: str) -> list[str]:
    """Names of other libraries that `translate` understands in a section, for "did you mean"."""
    names = [*RENAMED.get(section, {}), *IGNORED.get(section, []), *ACCEPTED.get(section, {})]
    if section == "training":
        names += SPECIAL
    if section == "model":
        names += ["quantization_config", *BNB_NAMES]
    if section == "peft":
        names += ["peft_type", *PEFT_BOOKKEEPING]
    return names


def translate(raw: Mapping[str, Mapping[str, Any]]) -> tuple[Sections, list[str]]:
    """Gives the sections under this package's names, and lines to print about what was ignored.

    Keys that are nobody's stay where they are. Values may be typed or the text of a command line.
    Raises `InputError` where a key asks for something that is not supported, and where two names for
    one setting disagree.
    """
    sections: Sections = {name: {k: _plain(v) for k, v in values.items()} for name, values in raw.items()}
    notices: list[str] = []
    ignored: list[str] = []
    for section in ("training", "model"):
        values = sections.get(section, {})
        for name in [name for name in values if name in IGNORED[section]]:
            ignored.append(f"{section}.{name}")
            del values[name]
        for name in [name for name in values if name in RENAMED[section]]:
            _move(sections, f"{section}.{name}", RENAMED[section][name])
    ignored += _quantization(sections, notices)
    training = sections.get("training", {})
    for name in [name for name in training if name in SPECIAL]:
        value = _typed(training.pop(name))
        if name in FLAGS and not isinstance(value, bool | None):
            raise InputError(f"training.{name} is {value!r}, expected true or false")
        notice = SPECIAL[name](sections, value)
        if notice:
            notices.append(notice)
    _training_values(sections, notices)
    _peft_values(sections.get("peft", {}))
    for section, accepted in ACCEPTED.items():
        _check_accepted(section, sections.get(section, {}), accepted)
    if ignored:
        notices.append(f"has no meaning in JAX, ignored: {', '.join(ignored)}")
    return sections, notices


def _plain(value: Any) -> Any:
    """A Python user's enum or torch dtype as the text that YAML would hold."""
    if isinstance(value, Enum):
        return value.value
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    return value


def _typed(value: Any) -> Any:
    """What the text of a command line means."""
    if not isinstance(value, str):
        return value
    try:
        return parse_yaml(value)
    except ValueError:
        return value  # text it is, which no key takes that asks


def _set(sections: Sections, source: str, target: str, value: Any) -> None:
    """Sets `target`; an error if it was given another value under its own name."""
    section, key = target.split(".")
    values = sections.setdefault(section, {})
    if key in values and _typed(values[key]) != _typed(value):
        raise InputError(f"{source} wants {target} {value}, but {target} is {values[key]}; leave one of them out")
    values[key] = value


def _move(sections: Sections, source: str, target: str) -> None:
    section, key = source.split(".")
    _set(sections, source, target, sections[section].pop(key))


def _bf16(sections: Sections, value: Any) -> str | None:
    if value:
        _set(sections, f"training.bf16 {str(value).lower()}", "model.dtype", "bfloat16")
    return None


def _fp16(sections: Sections, value: Any) -> str | None:
    if not value:
        return None
    _set(sections, f"training.fp16 {str(value).lower()}", "model.dtype", "float16")
    return "training.fp16: the base is kept in float16, and there is no loss scaling; bf16 is the safer choice"


def _do_eval(sections: Sections, value: Any) -> str | None:
    if value is False:
        sections["training"].setdefault("eval_strategy", "no")
    return None


def _adafactor(sections: Sections, value: Any) -> str | None:
    if value:
        _set(sections, "training.adafactor", "training.optim", "adafactor")
    return None


def _disable_tqdm(sections: Sections, value: Any) -> str | None:
    if value is not None:
        _set(sections, f"training.disable_tqdm {str(value).lower()}", "logging.progress", not value)
    return None


def _report_to(sections: Sections, value: Any) -> str | None:
    if not isinstance(value, str | list | tuple | None):
        raise InputError(f"training.report_to is {_yaml(value)}, expected names such as tensorboard")
    names = [value or "none"] if isinstance(value, str | None) else list(value)
    installed = ["tensorboard"] + (["wandb"] if importlib.util.find_spec("wandb") else [])
    wanted = installed if names == ["all"] else names
    for name in ("tensorboard", "wandb"):
        _set(sections, f"training.report_to {value}", f"logging.{name}", name in wanted)
    others = [str(name) for name in wanted if name not in ("tensorboard", "wandb", "none")]
    return f"training.report_to: there is no reporting to {', '.join(others)} here, ignored" if others else None


def _assistant_only_loss(sections: Sections, value: Any) -> str | None:
    if value is not None:
        target = "assistant" if value else "all"
        _set(sections, f"assistant or completion only loss {str(value).lower()}", "data.loss_on", target)
    return None


def _dataset_text_field(sections: Sections, value: Any) -> str | None:
    if value not in (None, "text"):
        _set(sections, "training.dataset_text_field", "data.columns", {"text": value})
    return None


SPECIAL: dict[str, Callable[[Sections, Any], str | None]] = {
    "bf16": _bf16,
    "fp16": _fp16,
    "do_eval": _do_eval,
    "adafactor": _adafactor,
    "disable_tqdm": _disable_tqdm,
    "report_to": _report_to,
    "assistant_only_loss": _assistant_only_loss,
    "completion_only_loss": _assistant_only_loss,
    "dataset_text_field": _dataset_text_field,
}
FLAGS = SPECIAL.keys() - {"report_to", "dataset_text_field"}


def _training_values(sections: Sections, notices: list[str]) -> None:
    """Values of transformers under names that are also this package's own."""
    training = sections.get("training", {})
    for name in ("eval_strategy", "save_strategy"):
        if training.get(name) is False:  # what YAML makes of a bare `no`
            training[name] = "no"
    if "resume_from_checkpoint" in training and training["resume_from_checkpoint"] is None:
        training["resume_from_checkpoint"] = False
    optim = training.get("optim")
    if isinstance(optim, str) and optim in OPTIMIZERS:
        training["optim"], notice = OPTIMIZERS[optim]
        if notice:
            notices.append(f"training.optim {optim} is {training['optim']} here: {notice}")
    # transformers 5 has one setting: a whole number is steps, a fraction below 1 a ratio.
    steps = _typed(training.get("warmup_steps"))
    if isinstance(steps, float) and 0 < steps < 1:
        training.pop("warmup_steps")
        _set(sections, "training.warmup_steps", "training.warmup_ratio", steps)


def _quantization(sections: Sections, notices: list[str]) -> list[str]:
    """`quantization_config` and the same names in the section itself, as `model.quantization`.

    Returns the names of those that mean nothing here.
    """
    model = sections.get("model", {})
    section = _typed(model.pop("quantization_config", None)) or {}
    section = section.to_dict() if hasattr(section, "to_dict") else section
    if not isinstance(section, Mapping) or set(section) - set(BNB_NAMES):
        raise InputError(
            f"model.quantization_config is {_yaml(section)}, expected the names and values of a BitsAndBytesConfig"
        )
    given = {name: model.pop(name) for name in BNB_NAMES if name in model}
    if section and given:
        raise InputError(f"model.{next(iter(given))} is given beside model.quantization_config; leave one of them out")
    # Without a type BitsAndBytesConfig takes fp4, and TRL, whose names stand in the section itself, nf4.
    where, default = ("model.quantization_config", "fp4") if section else ("model", "nf4")
    values = {name: _typed(_plain(value)) for name, value in (section or given).items()}
    method = str(values.pop("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        raise InputError(f"{where}.quant_method is {method}, expected bitsandbytes; no other quantisation is supported")
    flags = {}
    for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant", "use_bnb_nested_quant"):
        flags[name] = values.get(name)
        if not isinstance(flags[name], bool | None):
            raise InputError(f"{where}.{name} is {_yaml(flags[name])}, expected true or false")
    four, eight = flags["load_in_4bit"], flags["load_in_8bit"]
    if four and eight:
        raise InputError(f"{where}.load_in_4bit and load_in_8bit are both true; leave one of them out")
    if not four and not eight:
        return [f"{where}.{name}" for name in values if name not in flags and values[name] is not None]
    if values.get("llm_int8_skip_modules") not in (None, [], ["lm_head"]) or values.get("llm_int8_has_fp16_weight"):
        raise InputError(
            f"{where}: llm_int8_skip_modules and llm_int8_has_fp16_weight are not supported; leave them out"
        )
    if four:
        _four_bit(sections, where, values, default)
    else:
        _set(sections, f"{where}.load_in_8bit", "model.quantization", "int8")
        notices.append(f"{where}.load_in_8bit: the weights are rounded to 8 bits here, and the activations are not")
    return [f"{where}.{name}" for name in BNB_IGNORED if name in values]


def _four_bit(sections: Sections, where: str, values: Mapping[str, Any], default: str) -> None:
    kind = values.get("bnb_4bit_quant_type", default)
    if kind != "nf4":
        raise InputError(f"{where}.bnb_4bit_quant_type is {kind}, which nothing is quantised to here; give nf4")
    _set(sections, f"{where}.load_in_4bit", "model.quantization", "nf4")
    for name in ("bnb_4bit_use_double_quant", "use_bnb_nested_quant"):
        if values.get(name) is not None:
            _set(sections, f"{where}.{name}", "model.double_quant", values[name])
    sections["model"].setdefault("double_quant", False)  # their default
    if values.get("bnb_4bit_compute_dtype") is not None:
        dtype = str(values["bnb_4bit_compute_dtype"]).removeprefix("torch.")
        _set(sections, f"{where}.bnb_4bit_compute_dtype", "model.dtype", dtype)


def _peft_values(peft: dict[str, Any]) -> None:
    kind = str(_plain(peft.pop("peft_type", None) or "LORA"))
    if kind.upper() != "LORA":
        raise InputError(f"peft.peft_type is {kind}, expected LORA; no other kind of adapter is supported")
    if "task_type" in peft and peft["task_type"] is None:
        del peft["task_type"]
    for name in PEFT_BOOKKEEPING:
        peft.pop(name, None)


def _check_accepted(section: str, values: dict[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    for name in [name for name in values if name in accepted]:
        value = _typed(values.pop(name))
        if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in accepted[name]):
            fine = " or ".join(_yaml(v) for v in accepted[name])
            raise InputError(
                f"{section}.{name} is {_yaml(value)}, which is not supported; leave it out, or give {fine}"
            )


def _yaml(value: Any) -> str:
    return json.dumps(value, default=str)
