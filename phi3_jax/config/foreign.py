"""The argument names of transformers, TRL and PEFT, translated to those of a run.

Scripts for those libraries hold two dictionaries, one for `TrainingArguments` or `SFTConfig` and one
for `LoraConfig`. Most of their keys are this package's own. The others, which foreign.yaml lists, are
moved to where their meaning lives here, refused where they ask for what is not supported, or passed over,
with the reason, where they change no result here: none is dropped in silence.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import yaml

from phi3_jax.config.plain import plain, typed
from phi3_jax.system.errors import InputError

Sections = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Names:
    """The names of other libraries in one section, by what is done with them.

    Attributes:
        renamed: Moved to another section or name.
        earlier: Those of them that are earlier names, of which null says nothing.
        flags: What true and what false set elsewhere.
        passed_over: What changes no result here, by the reason.
        accepted: Left out, and refused with other values than these.
        unsupported: Left out where empty, false or null, otherwise refused.
        beginnings: The same, but of no matter once an adapter is trained.
        bookkeeping: Left out.
        trl: Those that only SFTConfig has, by which a dictionary is known to be its.
        quantization: Those of BitsAndBytesConfig.
        quantization_ignored: Those of them that are passed over, with their defaults.
        adapter: Those of ModelConfig for the adapter, as LoraConfig has them.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    earlier: Sequence[str] = ()
    flags: Mapping[str, Mapping[bool, Mapping[str, object]]] = field(default_factory=dict)
    passed_over: Mapping[str, Sequence[str]] = field(default_factory=dict)
    accepted: Mapping[str, Sequence[object]] = field(default_factory=dict)
    unsupported: Sequence[str] = ()
    beginnings: Sequence[str] = ()
    bookkeeping: Sequence[str] = ()
    trl: Sequence[str] = ()
    quantization: Sequence[str] = ()
    quantization_ignored: Mapping[str, object] = field(default_factory=dict)
    adapter: Mapping[str, str] = field(default_factory=dict)

    @property
    def off(self) -> dict[str, Sequence[object]]:
        """What is not supported, with the values that leave it off."""
        return dict.fromkeys((*self.unsupported, *self.beginnings), (None, False, {}, []))

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why a name is passed over."""
        return {name: reason for reason, names in self.passed_over.items() for name in names}


@dataclass(frozen=True)
class Table:
    """What foreign.yaml holds.

    Attributes:
        training: The names of TrainingArguments and SFTConfig.
        model: Those of ModelConfig and BitsAndBytesConfig.
        peft: Those of LoraConfig.
        defaults: What a dictionary means by not naming a key, in its library's names: `transformers` for
            TrainingArguments, `trl` where SFTConfig differs, `peft` for LoraConfig.
        optimizers: The optimizer here that a value of `optim` means, and a line where something differs.
        generation: What GenerationConfig has and nothing here implements, with the values that mean "off".
    """

    training: Names
    model: Names
    peft: Names
    defaults: Mapping[str, Mapping[str, object]]
    optimizers: Mapping[str, Sequence[str]]
    generation: Mapping[str, Sequence[object]]


@cache
def table() -> Table:
    """Other libraries' names, read when they are first asked for."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    raw = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    training, model, peft = (Names(**raw[name]) for name in ("training", "model", "peft"))
    return Table(training, model, peft, raw["defaults"], raw["optimizers"], raw["generation"])


def known_names(section: str) -> list[str]:
    """Names of other libraries that `translate` understands in a section."""
    found = getattr(table(), section, None)
    if not isinstance(found, Names):
        return []
    names = [*found.reasons, *found.accepted, *found.unsupported, *found.beginnings, *found.bookkeeping]
    return [*useful_names(section), *names]


def useful_names(section: str) -> list[str]:
    """Those of them that set something, and so are worth a hint."""
    found = getattr(table(), section, None)
    if not isinstance(found, Names):
        return []
    special = {"training": [*SPECIAL, *TRL_OWN], "model": ["quantization_config"], "peft": ["peft_type"]}
    return [*found.renamed, *found.flags, *special[section], *found.quantization]


def translate(raw: Mapping[str, Mapping[str, object]]) -> tuple[Sections, list[str]]:
    """Gives the sections under this package's names, and lines to print about what was passed over.

    Keys that are nobody's stay where they are. Values may be typed or the text of a command line.

    Raises:
        InputError: A key asks for something that is not supported, or two names for one setting disagree.
    """
    sections: Sections = {name: {k: plain(v) for k, v in values.items()} for name, values in raw.items()}
    notices: list[str] = []
    passed: dict[str, list[str]] = {}
    _model_init_kwargs(sections)
    for section, names in (("training", table().training), ("model", table().model)):
        values = sections.get(section, {})
        for name in [name for name in values if name in names.reasons]:
            if not _says_nothing(name, typed(values.pop(name))):
                passed.setdefault(names.reasons[name], []).append(f"{section}.{name}")
        for name in [name for name in values if name in names.renamed]:
            value = values.pop(name)
            if typed(value) is not None or name not in names.earlier:
                _set(sections, f"{section}.{name}", names.renamed[name], value)
    _quantization(sections, notices, passed)
    _loss(sections)
    _flags(sections, notices)
    _training_values(sections, notices)
    _peft_values(sections.get("peft", {}))
    _check_accepted("training", sections.get("training", {}), table().training.accepted)
    _check_accepted("peft", sections.get("peft", {}), table().peft.off)
    notices += [f"passed over: {', '.join(names)} ({reason})" for reason, names in passed.items()]
    return sections, notices


def _says_nothing(name: str, value: object) -> bool:
    """Whether a value is off, or the default of its library."""
    return value == table().defaults["transformers"].get(name) or value in (None, False, "", "no", 0, {}, [])


def _set(sections: Sections, source: str, target: str, value: object) -> None:
    """Sets `target`; an error if it was given another value under its own name."""
    section, key = target.split(".")
    values = sections.setdefault(section, {})
    if key in values and typed(values[key]) != typed(value):
        raise InputError(f"{source} wants {target} {value}, but {target} is {values[key]}; leave one of them out")
    values[key] = value


def _flags(sections: Sections, notices: list[str]) -> None:
    """Names of true and false, and others that set what stands elsewhere."""
    training = sections.get("training", {})
    flags = table().training.flags
    fp16 = typed(training.get("fp16")) is True
    for name in [name for name in training if name in flags or name in SPECIAL]:
        value = typed(training.pop(name))
        if name not in WORDS and not isinstance(value, bool | None):
            raise InputError(f"training.{name} is {value!r}, expected true or false")
        if name in SPECIAL:
            SPECIAL[name](sections, value, notices)
        elif isinstance(value, bool):
            for target, meant in flags[name].get(value, {}).items():
                _set(sections, f"training.{name} {str(value).lower()}", target, meant)
        if name == "bf16" and value is False and "dtype" not in sections.get("model", {}) and not fp16:
            notices.append("training.bf16 false sets nothing here; model.dtype is bfloat16 until it is given: float32")
        if name == "fp16" and value:
            notices.append(
                "training.fp16: the base is kept in float16, and there is no loss scaling; bf16 is the safer choice"
            )


def _loss(sections: Sections) -> None:
    """What SFTConfig's two flags say about the loss, as one key.

    Without either of them TRL trains the completion where rows have one, and every token otherwise.
    """
    training = sections.get("training", {})
    flags = {name: training.pop(name) for name in ("assistant_only_loss", "completion_only_loss") if name in training}
    meant_by = {name: typed(value) for name, value in flags.items()}
    for name, value in meant_by.items():
        if not isinstance(value, bool | None):
            raise InputError(f"training.{name} is {value!r}, expected true or false")
    if all(value is None for value in meant_by.values()):
        return
    meant = "all" if meant_by.get("completion_only_loss") is False else "completion"
    meant = "assistant" if meant_by.get("assistant_only_loss") else meant
    _set(sections, " and ".join(f"training.{name} {_yaml(value)}" for name, value in meant_by.items()), LOSS, meant)


def _model_init_kwargs(sections: Sections) -> None:
    """What TRL hands on to `from_pretrained`, as the model's section."""
    given = typed(sections.get("training", {}).pop("model_init_kwargs", None)) or {}
    if not isinstance(given, Mapping):
        raise InputError(f"training.model_init_kwargs is {_yaml(given)}, expected a mapping of names and values")
    for name, value in given.items():
        _set(sections, f"training.model_init_kwargs.{name}", f"model.{name}", plain(value))


def _sampling(sections: Sections, value: object, notices: list[str]) -> None:
    orders = {
        "random": {},
        "sequential": {"data.shuffle": False},
        "group_by_length": {"training.group_by_length": True},
    }
    if value is None:
        return
    if value not in orders:
        raise InputError(f"training.train_sampling_strategy is {_yaml(value)}, expected one of {', '.join(orders)}")
    for target, meant in orders[str(value)].items():
        _set(sections, f"training.train_sampling_strategy {value}", target, meant)


def _log_level(sections: Sections, value: object, notices: list[str]) -> None:
    words = {"passive": None, "warning": "normal"}
    words |= dict.fromkeys(("debug", "detail", "info"), "verbose") | dict.fromkeys(("error", "critical"), "quiet")
    if value is not None and value not in words:
        raise InputError(f"training.log_level is {_yaml(value)}, expected one of {', '.join(words)}")
    if meant := words.get(str(value)):
        _set(sections, f"training.log_level {value}", "logging.verbosity", meant)


def _do_eval(sections: Sections, value: object, notices: list[str]) -> None:
    if value is False:
        sections["training"].setdefault("eval_strategy", "no")


def _report_to(sections: Sections, value: object, notices: list[str]) -> None:
    if not isinstance(value, str | list | tuple | None):
        raise InputError(f"training.report_to is {_yaml(value)}, expected names such as tensorboard")
    names = [value or "none"] if isinstance(value, str | None) else list(value)
    installed = ["tensorboard"] + (["wandb"] if importlib.util.find_spec("wandb") else [])
    wanted = installed if names == ["all"] else names
    for name in ("tensorboard", "wandb"):
        _set(sections, f"training.report_to {value}", f"logging.{name}", name in wanted)
    others = [str(name) for name in wanted if name not in ("tensorboard", "wandb", "none")]
    if others:
        notices.append(f"training.report_to: there is no reporting to {', '.join(others)} here, ignored")


def _dataset_text_field(sections: Sections, value: object, notices: list[str]) -> None:
    if value not in (None, "text"):
        _set(sections, "training.dataset_text_field", "data.columns", {"text": value})


SPECIAL: dict[str, Callable[[Sections, object, list[str]], None]] = {
    "do_eval": _do_eval,
    "report_to": _report_to,
    "dataset_text_field": _dataset_text_field,
    "log_level": _log_level,
    "train_sampling_strategy": _sampling,
}
# Those of them that are no flags.
WORDS = ("report_to", "dataset_text_field", "log_level", "train_sampling_strategy")
LOSS = "data.loss_on"
# What `_loss` and `_model_init_kwargs` read.
TRL_OWN = ("assistant_only_loss", "completion_only_loss", "model_init_kwargs")


def _training_values(sections: Sections, notices: list[str]) -> None:
    """Values of transformers under names that are also this package's own."""
    training = sections.get("training", {})
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        if training.get(name) is False:  # what YAML makes of a bare `no`
            training[name] = "no"
    if "resume_from_checkpoint" in training and training["resume_from_checkpoint"] is None:
        training["resume_from_checkpoint"] = False
    optim = training.get("optim")
    if isinstance(optim, str) and optim in table().optimizers:
        training["optim"], *differences = table().optimizers[optim]
        notices += [f"training.optim {optim} is {training['optim']} here: {text}" for text in differences]
    # transformers 5 has one setting: a whole number is steps, a fraction below 1 a ratio.
    steps = typed(training.get("warmup_steps"))
    if isinstance(steps, float) and 0 < steps < 1:
        training.pop("warmup_steps")
        _set(sections, "training.warmup_steps", "training.warmup_ratio", steps)


def _quantization(sections: Sections, notices: list[str], passed: dict[str, list[str]]) -> None:
    """`quantization_config` and the same names in the section itself, as `model.quantization`."""
    model = sections.get("model", {})
    section = typed(model.pop("quantization_config", None)) or {}
    section = section.to_dict() if hasattr(section, "to_dict") else section
    if not isinstance(section, Mapping) or set(section) - set(table().model.quantization):
        raise InputError(
            f"model.quantization_config is {_yaml(section)}, expected the names and values of a BitsAndBytesConfig"
        )
    given = {name: model.pop(name) for name in table().model.quantization if name in model}
    if section and given:
        raise InputError(f"model.{next(iter(given))} is given beside model.quantization_config; leave one of them out")
    # Without a type BitsAndBytesConfig takes fp4, and TRL, whose names stand in the section itself, nf4.
    where, default = ("model.quantization_config", "fp4") if section else ("model", "nf4")
    values = {name: typed(plain(value)) for name, value in (section or given).items()}
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
        unread = [f"{where}.{name}" for name in values if name not in flags and values[name] is not None]
        if unread:
            passed["neither load_in_4bit nor load_in_8bit is true"] = unread
        return
    if values.get("llm_int8_skip_modules") not in (None, [], ["lm_head"]) or values.get("llm_int8_has_fp16_weight"):
        raise InputError(
            f"{where}: llm_int8_skip_modules and llm_int8_has_fp16_weight are not supported; leave them out"
        )
    if four:
        _four_bit(sections, where, values, default, notices)
    else:
        _set(sections, f"{where}.load_in_8bit", "model.quantization", "int8")
        notices.append(f"{where}.load_in_8bit: the weights are rounded to 8 bits here, and the activations are not")
    silent = table().model.quantization_ignored
    others = [f"{where}.{name}" for name in silent if values.get(name, silent[name]) not in (silent[name], None)]
    if others:
        passed["bitsandbytes' own way of working"] = others


def _four_bit(sections: Sections, where: str, values: Mapping[str, object], default: str, notices: list[str]) -> None:
    kind = values.get("bnb_4bit_quant_type", default)
    if kind != "nf4":
        raise InputError(f"{where}.bnb_4bit_quant_type is {kind}, which nothing is quantised to here; give nf4")
    _set(sections, f"{where}.load_in_4bit", "model.quantization", "nf4")
    for name in ("bnb_4bit_use_double_quant", "use_bnb_nested_quant"):
        if values.get(name) is not None:
            _set(sections, f"{where}.{name}", "model.double_quant", values[name])
    sections["model"].setdefault("double_quant", False)  # their default
    if values.get("bnb_4bit_compute_dtype") is None:
        return
    dtype = str(values["bnb_4bit_compute_dtype"]).removeprefix("torch.")
    source = f"{where}.bnb_4bit_compute_dtype"
    training, own = sections.get("training", {}), sections["model"].get("dtype")
    mixed = [meant for flag, meant in (("bf16", "bfloat16"), ("fp16", "float16")) if typed(training.get(flag)) is True]
    # Mixed precision wins there, and float32, their default, stands for the type of what comes in.
    wins = mixed[0] if mixed else own if dtype == "float32" else None
    if wins in (None, dtype):
        _set(sections, source, "model.dtype", dtype)
    else:
        notices.append(f"passed over: {source} {dtype} (the run computes in {wins}, as it does there)")


def _peft_values(peft: dict[str, object]) -> None:
    kind = str(plain(peft.pop("peft_type", None) or "LORA"))
    if kind.upper() != "LORA":
        raise InputError(f"peft.peft_type is {kind}, expected LORA; no other kind of adapter is supported")
    if "task_type" in peft and peft["task_type"] is None:
        del peft["task_type"]
    for name in table().peft.bookkeeping:
        peft.pop(name, None)


def _check_accepted(section: str, values: dict[str, object], accepted: Mapping[str, Sequence[object]]) -> None:
    for name in [name for name in values if name in accepted]:
        value = typed(values.pop(name))
        if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in accepted[name]):
            fine = " or ".join(_yaml(v) for v in accepted[name])
            raise InputError(
                f"{section}.{name} is {_yaml(value)}, which is not supported; leave it out, or give {fine}"
            )


def _yaml(value: object) -> str:
    return json.dumps(value, default=str)
