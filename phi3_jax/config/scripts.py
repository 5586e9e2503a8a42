"""A script for TRL and PEFT as the sections of a run: what it says, and what it means by saying nothing.

A key that a script leaves out has TRL's, transformers' or PEFT's default, which is often another than this
package's own (foreign.yaml lists them under `defaults`; docs/dictionaries.md shows all of them).
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Protocol, runtime_checkable

from phi3_jax.config.foreign import Sections, table, translate
from phi3_jax.config.peft_object import with_targets
from phi3_jax.config.plain import plain
from phi3_jax.config.sections import DataSection
from phi3_jax.config.training import TrainingSection
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import shown

# What TRL does with text, and with rows that have nothing to train on.
AS_TRL: Mapping[str, object] = {"template": "none", "final_eos": True, "loss_on": "completion", "skip_empty": True}
# The names of the type of the base's weights.
DTYPES = ("dtype", "torch_dtype")
# Keys that are true or false.
SWITCHES = frozenset(key.name for kind in (DataSection, TrainingSection) for key in fields(kind) if key.type is bool)


@runtime_checkable
class Arguments(Protocol):
    """An object of another library that tells its values, as SFTConfig, LoraConfig and BitsAndBytesConfig do."""

    def to_dict(self) -> dict[str, object]: ...


# What a script gives: a dictionary, or an object (ModelConfig is a dataclass that has no `to_dict`).
Given = Mapping[str, object] | Arguments


def sections_of_script(
    *,
    model: str | Given,
    training_config: Given,
    peft_config: Given | None,
    data: str | Mapping[str, object],
    quantization_config: Given | None = None,
) -> tuple[Sections, list[str]]:
    """The sections of what a script gives to SFTTrainer, under this package's names.

    Args:
        model: Checkpoint, or the section `model`, or TRL's ModelConfig.
        training_config: Of TrainingArguments or SFTConfig.
        peft_config: Of LoraConfig; None trains all weights, as TRL does.
        data: Rows to train on, or the section `data`, whose keys win over TRL's defaults.
        quantization_config: Of BitsAndBytesConfig.

    Returns:
        The sections, and lines to print.

    Raises:
        InputError: A key asks for what is not supported, or two disagree.
    """
    training = _mapping("training_config", training_config)
    rows = plain(data)
    rows = {"train": rows} if isinstance(rows, str) else _mapping("data", rows)
    defaults = _defaults(training)
    base, notices = _model(model, training, quantization_config)
    from_model = _adapter_of(base)
    peft = from_model if peft_config is None else _mapping("peft_config", peft_config)
    if from_model is not None and peft_config is not None:
        notices.append("passed over: model.use_peft and its lora_* (peft_config is given)")
    if peft is None:
        notices.append("no peft_config: all weights of the model are trained, as TRL does")
    else:
        notices += with_targets(peft)
    said, more = translate(
        {
            "model": base,
            "data": rows,
            "training": _other_than(training, defaults),
            "peft": {"full_finetuning": True} if peft is None else _other_than(peft, table().defaults["peft"]),
        }
    )
    for section in ("training", "data"):
        _null_as_false(said[section])
    _null_and_zero(said["training"])
    unsaid, _ = translate(
        {"data": AS_TRL, "training": defaults, "peft": {} if peft is None else table().defaults["peft"]}
    )
    run = _merged(unsaid, said)
    if run["training"]["eval_strategy"] == "steps" and run["training"].get("eval_steps") is None:
        run["training"]["eval_steps"] = run["training"]["logging_steps"]  # as TrainingArguments does
    return run, [*notices, *more]


def _merged(below: Sections, above: Sections) -> Sections:
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}


def _mapping(name: str, given: object) -> dict[str, object]:
    """The values of a dictionary, of an object of another library, or of its dataclass.

    `to_dict` writes `<HUB_TOKEN>` and the like for tokens, set or not, which says nothing; the object knows.
    """
    if not isinstance(given, Arguments | Mapping) and not is_dataclass(given):
        raise InputError(f"{name} is {shown(given)}, expected a dictionary, or an object of TRL, transformers or PEFT")
    values = given.to_dict() if isinstance(given, Arguments) else given if isinstance(given, Mapping) else vars(given)
    if unnamed := [key for key in values if not isinstance(key, str)]:
        raise InputError(f"{name} has the key {shown(unnamed[0])}, expected names")
    masked = {key for key, value in values.items() if key.endswith("_token") and value == f"<{key.upper()}>"}
    known = {key: getattr(given, key) for key in masked if hasattr(given, key)}
    return {**{key: value for key, value in values.items() if key not in masked}, **known}


def _defaults(training: Mapping[str, object]) -> dict[str, object]:
    """Those of the library whose names a script uses."""
    ours = table()
    of_trl = not set(training).isdisjoint(ours.training.trl)
    return {**ours.defaults["transformers"], **(ours.defaults["trl"] if of_trl else {})}


def _other_than(given: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """What differs from the defaults; the rest, which `to_dict` gives too, may be said elsewhere in the run."""
    return {
        name: value
        for name, value in given.items()
        if not (name in defaults and type(value) is type(defaults[name]) and value == defaults[name])
    }


def _model(
    model: object, training: dict[str, object], quantization: Given | None
) -> tuple[dict[str, object], list[str]]:
    """The model's section with the type in which a script computes, and lines to print."""
    model = plain(model)
    section: dict[str, object] = {"name_or_path": model} if isinstance(model, str) else _mapping("model", model)
    if quantization is not None:
        if section.get("quantization_config") is not None:
            raise InputError("quantization_config is given twice, once in model; leave one of them out")
        section["quantization_config"] = _mapping("quantization_config", quantization)
    if isinstance(given := training.get("model_init_kwargs"), dict):
        training["model_init_kwargs"] = dict(given)  # the script's own stays as it is
    places = (section, training.get("model_init_kwargs"))
    named = [(values, key) for values in places if isinstance(values, dict) for key in DTYPES if values.get(key)]
    mixed = next((flag for flag in ("bf16", "fp16") if training.get(flag) is True), None)
    if mixed is None and training.get("bf16") is False and not named and not _computes_in(places):
        section["dtype"] = "float32"  # in which TRL loads a model that is named
    notices = []
    for values, key in named:
        if values[key] == "auto":
            del values[key]
            if mixed is None:
                notices.append(f"{key} auto: bfloat16, which Phi-3's checkpoints have; model.dtype says otherwise")
        elif mixed is not None and str(values[key]).removeprefix("torch.") == "float32":
            del values[key]
            notices.append(f"training.{mixed}: products are of 16 bits, and the base is kept in them, not in float32")
    return section, notices


def _computes_in(places: Iterable[object]) -> bool:
    """Whether a BitsAndBytesConfig says in which type its products are."""
    names = [values for values in places if isinstance(values, Mapping)]
    given = [*names, *(values["quantization_config"] for values in names if values.get("quantization_config"))]
    told = [_mapping("quantization_config", each) for each in given]
    return any(each.get("load_in_4bit") and each.get("bnb_4bit_compute_dtype") is not None for each in told)


def _adapter_of(section: dict[str, object]) -> dict[str, object] | None:
    """The adapter that TRL's ModelConfig has beside the model, taken out of the section."""
    names = table().model.adapter
    found = {names[name]: section.pop(name) for name in list(section) if name in names}
    if "use_peft" in section and not section.get("load_in_4bit"):
        section.pop("bnb_4bit_quant_type", None)  # which every ModelConfig has
    return found if section.pop("use_peft", None) else None


def _null_as_false(values: dict[str, object]) -> None:
    """What null means where Python asks whether something is true."""
    for name in values:
        if values[name] is None and name in SWITCHES:
            values[name] = False


def _null_and_zero(training: dict[str, object]) -> None:
    """What null and zero mean in TrainingArguments, where they mean another thing here."""
    steps = training.get("max_steps", -1)
    if steps is None or (isinstance(steps, int) and steps < 1):
        training["max_steps"] = -1
    if training.get("max_grad_norm", 1) is None:
        training["max_grad_norm"] = 0.0
    if training.get("eval_steps", 1) == 0:
        training["eval_steps"] = None
    for name in ("output_dir", "warmup_ratio", "warmup_steps", "eval_delay"):  # not said
        if training.get(name, 0) is None:
            del training[name]
