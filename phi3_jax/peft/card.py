"""The model card beside an adapter."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from phi3_jax.config.hub_options import is_hub_id
from phi3_jax.config.lora import LoraConfig
from phi3_jax.system.dotted import last_part


def model_card(config: LoraConfig, count: int) -> str:
    """README.md of an adapter.

    Args:
        config: What adapter_config.json says, of the base too.
        count: Of the numbers in the file.
    """
    base = _public(config.base_model_name_or_path)
    given = repr(base or "path to the base model") + (f", revision={config.revision!r}" if config.revision else "")
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*([f"base_model:adapter:{base}"] if base else []), "lora", "phi3", "phi3_jax"],
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(config))
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# LoRA adapter for {base or "the base model"}

Made with phi3_jax. {count:,} parameters, float32.

| | |
|---|---|
{rows}

## Use with PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({given})
model = PeftModel.from_pretrained(model, "path to this folder")
```

## Use with phi3_jax

```python
import phi3_jax as p3

model = p3.Phi3ForCausalLM.from_pretrained({given})
lora = p3.load_adapter("path to this folder", model)
logits = model(input_ids, lora=lora)
```
"""


def merged_card(config: LoraConfig, base: str, dtype: str) -> str:
    """README.md of a model that an adapter was merged into.

    Args:
        config: The adapter's.
        base: Folder or hub id of the base.
        dtype: Of the weights.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(config))
    how = f"An adapter was merged into its weights with phi3_jax, in float32, rounded once to {dtype}."
    return (
        _card_of_model(_public(base), ["lora"], how)
        + f"""
## The adapter

| | |
|---|---|
{rows}
"""
    )


def trained_card(base: str) -> str:
    """README.md of a model all of whose weights were trained, from `base`."""
    return _card_of_model(_public(base), [], "All of its weights were trained with phi3_jax.")


def _card_of_model(base: str | None, tags: list[str], how: str) -> str:
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*([f"base_model:finetune:{base}"] if base else []), *tags, "phi3", "phi3_jax"],
    }
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {base or "Phi-3"}, fine-tuned

{how}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path to this folder")
tokenizer = AutoTokenizer.from_pretrained("path to this folder")
```
"""


def _public(base: str | None) -> str | None:
    """The base's name where others can find it: the hub takes no card that names a folder."""
    return base if base is not None and is_hub_id(base) and not Path(base).exists() else None


def _rows(config: LoraConfig) -> list[tuple[str, str]]:
    scale = "α/√r" if config.use_rslora else "α/r"
    rows = [
        *([("base's revision", config.revision)] if config.revision else []),
        ("kind", _kind(config)),
        ("modules", ", ".join(_modules(config))),
        ("rank r", _values(config.r, config.rank_pattern)),
        ("α", _values(config.lora_alpha, config.alpha_pattern)),
    ]
    if config.rank_pattern or config.alpha_pattern:
        rows.append((f"scale ({scale})", "by module"))
    else:
        rows.append((f"scale ({scale})", f"{config.scaling:g}"))
    rows.append(("dropout in training", f"{config.lora_dropout:g}"))
    if config.modules_to_save:
        rows.append(("whole modules", ", ".join(config.modules_to_save)))
    tokens = config.trainable_token_indices
    if tokens:
        by_module = tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}
        rows.append(("rows of tokens", ", ".join(f"{len(ids)} of {name}" for name, ids in by_module.items())))
    return rows


def _kind(config: LoraConfig) -> str:
    name = "DoRA" if config.use_dora else "LoRA"
    extras = [
        text for text, on in (("rank-stabilised", config.use_rslora), ("with a bias on B", config.lora_bias)) if on
    ]
    if isinstance(config.init_lora_weights, str):
        extras.append(f"started as {config.init_lora_weights}")
    return ", ".join([name, *extras])


def _modules(config: LoraConfig) -> list[str]:
    """The modules by their last parts, with the layers of those that not all layers have."""
    layers: dict[str, list[int]] = {}
    names = []
    for name in config.target_modules:
        if name.startswith("model.layers."):
            layers.setdefault(last_part(name), []).append(int(name.split(".")[2]))
        else:
            names.append(name)
    return sorted(
        [*names, *(f"{name} (layers {', '.join(map(str, sorted(found)))})" for name, found in layers.items())]
    )


def _values(default: float, pattern: Mapping[str, float] | None) -> str:
    others = [f"{value:g} in {name}" for name, value in (pattern or {}).items()]
    return ", ".join([f"{default:g}", *others])
