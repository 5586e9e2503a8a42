"""Writes docs/dictionaries.md: what becomes of every key of a script for TRL and PEFT.

python scripts/docs_dictionaries.py
"""

from dataclasses import fields
from pathlib import Path

from phi3_jax import RunConfig
from phi3_jax.config.foreign import TRL_OWN, Names, table
from phi3_jax.config.run import SECTIONS
from phi3_jax.config.scripts import sections_of_script

PAGE = Path(__file__).parents[1] / "docs" / "dictionaries.md"

HEAD = """\
# Keys of other libraries

What becomes of each key that a script gives to TrainingArguments, SFTConfig, ModelConfig, BitsAndBytesConfig or
LoraConfig. `RunConfig.from_dicts` and `RunConfig.from_trl` take all of them; a YAML file and the command line take the
same names in the sections `training`, `model` and `peft`, but for those marked ModelConfig, whose own names say it
there. [Configuration](configuration.md) says how to use them.

`scripts/docs_dictionaries.py` writes this page from the tables that the program itself reads.

## Defaults

A key that a dictionary does not name has the default of its library (transformers 5.23, TRL 1.16, PEFT 0.21), not that
of a YAML file. The third column is for dictionaries with at least one name that only SFTConfig has, and for SFTConfig
itself. These keys differ:

"""
# Keys of a run's sections that no library has.
OURS = {
    "training": {
        "debug_nans",
        "early_stopping_patience",
        "early_stopping_threshold",
        "eval_generations",
        "eval_max_new_tokens",
        "fallback_dir",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "max_skipped_steps",
        "remat_policy",
        "resume_changed",
    },
    "model": {"attention", "double_quant", "name_or_path", "quantization"},
    "peft": {"full_finetuning", "init_from"},
}
WORDS = {
    "adafactor": "true is `training.optim: adafactor`",
    "assistant_only_loss": "true is `data.loss_on: assistant`",
    "bf16": "true is `model.dtype: bfloat16`; false, in a script that names no type, float32",
    "completion_only_loss": "false is `data.loss_on: all`; otherwise `completion`: of rows that have one that, "
    "of others every token",
    "dataset_text_field": "`data.columns: {text: …}`",
    "disable_tqdm": "`logging.progress`, the other way round",
    "do_eval": "false is `training.eval_strategy: no`",
    "fp16": "true is `model.dtype: float16`, without loss scaling, which a line says",
    "log_level": "`logging.verbosity`: info and below verbose, warning normal, error and above quiet",
    "model_init_kwargs": "the section `model`",
    "report_to": "`logging.tensorboard` and `logging.wandb`; others are named in a line",
    "train_sampling_strategy": "`data.shuffle` and `training.group_by_length`",
}
QUANTIZATION = {
    "bnb_4bit_compute_dtype": "`model.dtype`, where `bf16` and `fp16` do not say it",
    "bnb_4bit_quant_type": "refused with other values than `nf4`",
    "bnb_4bit_use_double_quant": "`model.double_quant`",
    "llm_int8_has_fp16_weight": "refused where true",
    "llm_int8_skip_modules": "refused with other values than `null`, `[]` and `[lm_head]`",
    "load_in_4bit": "true is `model.quantization: nf4`",
    "load_in_8bit": "true is `model.quantization: int8`; activations are not rounded, which a line says",
    "_load_in_4bit": "left out: bitsandbytes' own bookkeeping",
    "_load_in_8bit": "left out: bitsandbytes' own bookkeeping",
    "quant_method": "refused with other values than `bitsandbytes`",
    "use_bnb_nested_quant": "`model.double_quant`",
}


def page() -> str:
    """The page's text."""
    parts = [HEAD, _defaults(), "\n## TrainingArguments and SFTConfig\n\n", _keys("training", table().training)]
    parts += ["\n## The model, ModelConfig and BitsAndBytesConfig\n\n", _keys("model", table().model)]
    parts += ["\n## LoraConfig\n\n", _keys("peft", table().peft)]
    return "".join(parts)


def _defaults() -> str:
    own = RunConfig.from_dict({"model": {"name_or_path": "x"}, "data": {"train": "x"}}).to_dict()
    peft = {"target_modules": "all-linear"}
    theirs = []
    for training in ({}, {"dataset_text_field": "text"}):
        sections, _ = sections_of_script(model="x", training_config=training, peft_config=peft, data="x")
        theirs.append(RunConfig.from_dict(sections).to_dict())
    lines = ["| key | YAML | TrainingArguments, LoraConfig | SFTConfig |", "|---|---|---|---|"]
    for section, values in own.items():
        for key, value in values.items():
            others = [run[section][key] for run in theirs]
            if any(other != value for other in others):
                cells = " | ".join(f"`{_yaml(cell)}`" for cell in (value, *others))
                lines.append(f"| `{section}.{key}` | {cells} |")
    return "\n".join(lines) + "\n"


def _keys(section: str, names: Names) -> str:
    rows = {field.name: "the same" for field in fields(SECTIONS[section]) if field.name not in OURS[section]}
    rows |= {name: f"`{target}`" for name, target in names.renamed.items()}
    rows |= {name: WORDS[name] for name in names.flags}
    if section == "training":
        rows |= {name: WORDS[name] for name in (*WORDS, *TRL_OWN)}
    if section == "model":
        rows |= dict.fromkeys(names.quantization_ignored, "passed over: bitsandbytes' own way of working")
        rows |= {name: QUANTIZATION[name] for name in names.quantization if name not in rows}
        rows |= {f"{name} (ModelConfig)": f"`peft.{target}`" for name, target in names.adapter.items()}
        rows["use_peft (ModelConfig)"] = "false leaves its `lora_*` out: all weights are trained"
        rows["quantization_config"] = "the names of BitsAndBytesConfig"
    rows |= {name: f"passed over: {reason}" for name, reason in names.reasons.items()}
    rows |= {
        name: f"refused with other values than {_listed([f'`{_yaml(value)}`' for value in values])}"
        for name, values in {**names.accepted, **names.off}.items()
    }
    rows |= dict.fromkeys(names.bookkeeping, "left out: PEFT's own bookkeeping")
    if section == "peft":
        rows["peft_type"] = "refused with other values than `LORA`"
    ordered = sorted(rows, key=lambda name: name.lstrip("_"))
    return "\n".join(["| theirs | here |", "|---|---|", *(f"| `{name}` | {rows[name]} |" for name in ordered)]) + "\n"


def _listed(values: list[str]) -> str:
    return " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _yaml(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool | None):
        return words[value]
    return '""' if value == "" else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
