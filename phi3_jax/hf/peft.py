"""Adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from phi3_jax.config import LoraConfig
from phi3_jax.errors import InputError
from phi3_jax.hf.hub import resolve_checkpoint
from phi3_jax.hf.safetensors_io import FLOATS, TensorEntry, TensorSource, read_header, read_tensor, write_safetensors
from phi3_jax.lora.adapters import Lora, LoraEmbedding, LoraLinear
from phi3_jax.lora.targets import Module, checkpoint_names, match_targets
from phi3_jax.model import Phi3ForCausalLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Entries of adapter_config.json that change nothing about what a finished LoRA adapter computes:
# where it came from, how it was trained, and settings of features that another entry turns on.
IRRELEVANT = {
    "auto_mapping",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
SUPPORTED = {
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "r",
    "target_modules",
    "task_type",
    "use_rslora",
}


def save_adapter(
    folder: str | Path,
    lora: Lora,
    *,
    tokenizer: Any = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads: config, float32 weights, a model card.

    An adapter that is in the folder already is replaced; should that be interrupted, the folder is
    left without adapter_config.json, so that nobody loads old and new mixed.

    **Arguments**
    - `tokenizer`: saved along where given (anything with transformers' `save_pretrained`).
    - `base_model_name_or_path`: what `AutoPeftModelForCausalLM` will look for; default: that of
      `lora.config`.

    Raises `InputError` where the folder cannot be written.
    """
    folder = Path(folder)
    base = base_model_name_or_path or lora.config.base_model_name_or_path
    sources = list(_sources(lora))
    config = _config_entries(lora, base)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        write_safetensors(temporary / WEIGHTS_FILE, sources)
        (temporary / "README.md").write_text(_model_card(lora, base), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        _move(temporary, folder)
    except OSError as error:
        raise InputError(
            f"{folder}: the adapter cannot be written ({error.strerror}); choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(
    path_or_hub_id: str | Path,
    model: Phi3ForCausalLM,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Lora:
    """Reads a LoRA adapter that PEFT (or `save_adapter`) wrote, as float32 whatever its file's type.

    **Arguments**
    - `path_or_hub_id`: a folder, or a hub id that is downloaded and cached; `revision`, `token`,
      `cache_dir`, `local_files_only` as in huggingface_hub.
    - `model`: the base, whose names and shapes the adapter must fit.

    Raises `InputError` for another kind of adapter, for every feature that is not supported, and,
    all at once, for tensors that are missing, unknown, misshapen or not finite. Pickles
    (adapter_model.bin) are never opened.
    """
    folder = resolve_checkpoint(
        path_or_hub_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        patterns=(CONFIG_FILE, WEIGHTS_FILE),
    )
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        # Of a hub's repository a pickle is not even downloaded, so it may be there unseen.
        found = "found only adapter_model.bin" if (folder / "adapter_model.bin").exists() else "not found"
        raise InputError(
            f"{folder}: {WEIGHTS_FILE} expected, {found} (a pickle, which can run code, is not opened); "
            "save the adapter as safetensors"
        )
    try:
        modules = match_targets(model, config.target_modules)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    return _read_weights(path, config, modules, model)


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """Reads `folder/adapter_config.json`.

    Raises `InputError` for kinds of adapter other than LoRA, and naming every entry that asks for
    something not supported yet; entries nobody here has heard of count as such unless they are
    empty, false or null.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a PEFT adapter's folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); save the adapter again") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'; no other kind is supported")
    unsupported = [f"{name} {_short(raw[name])}" for name in sorted(raw) if _is_unsupported(name, raw[name])]
    if unsupported:
        raise InputError(f"{path}: not supported yet: {', '.join(unsupported)}; save an adapter without")
    if raw.get("target_modules") is None:
        raise InputError(f"{path}: target_modules is not given; name the modules that have adapters")
    entries = {name: raw[name] for name in SUPPORTED if raw.get(name) is not None}
    for name, default in (("r", 8), ("lora_alpha", 8)):  # PEFT's, not ours
        entries.setdefault(name, default)
    try:
        return LoraConfig(**entries)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _is_unsupported(name: str, value: Any) -> bool:
    if name in IRRELEVANT:
        return False
    if name == "init_lora_weights":
        # PiSSA, OLoRA, LoftQ and CorDA changed the base too: on the untouched one they are wrong.
        return value not in (None, True, False, "gaussian")
    if name == "bias":
        return value not in (None, "none")
    if name == "task_type":
        return value not in (None, "CAUSAL_LM")
    return name not in SUPPORTED and bool(value)


def _config_entries(lora: Lora, base: str | None) -> dict[str, Any]:
    config = lora.config
    alpha = config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": config.r,
        # PEFT's own numbers are whole ones where they can be.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        # The modules themselves, not the pattern that found them: vLLM and others read only names.
        "target_modules": sorted(_suffix(name) for name, _ in lora.items()),
        "init_lora_weights": config.init_lora_weights,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def _sources(lora: Lora) -> Iterator[TensorSource]:
    """PEFT's tensors of an adapter, layer by layer."""
    config = lora.config
    for name, adapter in lora.items():
        rank = adapter.lora_A.shape[-2]
        if rank != config.r or adapter.scaling != config.scaling:
            raise InputError(
                f"{name} has rank {rank} and scale {adapter.scaling:g}, its configuration r={config.r} and scale "
                f"{config.scaling:g}; adapters that differ from their configuration cannot be saved"
            )
        arrays = jax.device_get((adapter.lora_A, adapter.lora_B))
        stacked = arrays[0].ndim == 3
        for index, module_name in enumerate(checkpoint_names(name, len(arrays[0]))):
            names = _tensor_names(module_name, isinstance(adapter, LoraEmbedding))
            for tensor, array in zip(names, arrays, strict=True):
                yield _source(tensor, array[index] if stacked else array)


def _source(name: str, array: np.ndarray) -> TensorSource:
    return TensorSource(name, np.dtype(np.float32), array.shape, lambda: array.astype(np.float32))


def _tensor_names(module_name: str, is_embedding: bool) -> tuple[str, str]:
    """The names of A and B."""
    if is_embedding:
        return f"{PREFIX}{module_name}.lora_embedding_A", f"{PREFIX}{module_name}.lora_embedding_B"
    return f"{PREFIX}{module_name}.lora_A.weight", f"{PREFIX}{module_name}.lora_B.weight"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _read_weights(path: Path, config: LoraConfig, modules: list[Module], model: Phi3ForCausalLM) -> Lora:
    entries = read_header(path)
    expected: dict[str, tuple[int, ...]] = {}
    for module in modules:
        out_features, in_features = reversed(module.shape) if module.is_embedding else module.shape
        for name in module.names:
            a, b = _tensor_names(name, module.is_embedding)
            expected |= {a: (config.r, in_features), b: (out_features, config.r)}
    # PEFT saves the untouched table along where embedding or output head have an adapter.
    base_copies = {name: entry for name, entry in entries.items() if name in _base_weight_names()}
    shared = [entries[name] for name in expected if name in entries]
    problems = {
        "missing": [name for name in expected if name not in entries],
        "unknown": [name for name in entries if name not in expected and name not in base_copies],
        "misshapen": [
            f"{e.name} is {list(e.shape)}, expected {list(expected[e.name])}"
            for e in shared
            if e.shape != expected[e.name]
        ],
        "of the wrong type": [f"{e.name} is {e.dtype}" for e in entries.values() if e.dtype not in FLOATS],
    }
    _raise_for(path, problems)
    arrays = {entry.name: _read(entry) for entry in shared}
    problems = {
        "not finite": [name for name, array in arrays.items() if not np.isfinite(array).all()],
        "changed embeddings, which are not supported yet": [
            name for name, entry in base_copies.items() if not _is_base_weight(entry, model)
        ],
    }
    _raise_for(path, problems)
    return Lora.from_items({module.name: _adapter(module, config, arrays) for module in modules}, config)


def _adapter(module: Module, config: LoraConfig, arrays: dict[str, np.ndarray]) -> LoraLinear | LoraEmbedding:
    pairs = [_tensor_names(name, module.is_embedding) for name in module.names]
    a, b = (np.stack([arrays.pop(name) for name in names]) for names in zip(*pairs, strict=True))
    if not module.stack:
        a, b = a[0], b[0]
    if module.is_embedding:
        return LoraEmbedding(jnp.asarray(a), jnp.asarray(b), config.scaling)
    return LoraLinear(jnp.asarray(a), jnp.asarray(b), config.scaling, config.lora_dropout)


def _raise_for(path: Path, problems: Mapping[str, list[str]]) -> None:
    """One line for all that is wrong, at most three names of each kind."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {kind} ({'; '.join(names[:3])}{more})")
    if parts:
        raise InputError(f"{path}: tensors do not fit the model and {CONFIG_FILE}: {', '.join(parts)}")


def _read(entry: TensorEntry) -> np.ndarray:
    array = np.empty(entry.shape, np.float32)
    read_tensor(entry, array)
    return array


def _base_weight_names() -> set[str]:
    return {
        f"{PREFIX}{module}{part}.weight" for module in ("model.embed_tokens", "lm_head") for part in ("", ".base_layer")
    }


def _is_base_weight(entry: TensorEntry, model: Phi3ForCausalLM) -> bool:
    head, table = model.lm_head, model.model.embed_tokens
    weight = (head if head is not None and ".lm_head." in entry.name else table).weight[...]
    return entry.shape == weight.shape and np.array_equal(_read(entry).astype(weight.dtype), np.asarray(weight))


def _move(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG_FILE):  # the config last
        if file.is_dir():  # a tokenizer's further chat templates
            shutil.rmtree(folder / file.name, ignore_errors=True)
        os.replace(file, folder / file.name)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _model_card(lora: Lora, base: str | None) -> str:
    config = lora.config
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*([f"base_model:adapter:{base}"] if base else []), "lora", "phi3", "phi3_jax"],
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(lora))
    scale = "α/√r" if config.use_rslora else "α/r"
    shown_base = base or "the base model"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# LoRA adapter for {shown_base}

Made with phi3_jax. {count:,} parameters, float32.

| | |
|---|---|
| modules | {", ".join(sorted(_suffix(name) for name, _ in lora.items()))} |
| rank r | {config.r} |
| α | {config.lora_alpha:g} |
| scale ({scale}) | {config.scaling:g} |
| dropout in training | {config.lora_dropout:g} |

## Use with PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base or "path to the base model"!r})
model = PeftModel.from_pretrained(model, "path to this folder")
```

## Use with phi3_jax

```python
import phi3_jax as p3

model = p3.Phi3ForCausalLM.from_pretrained({base or "path to the base model"!r})
lora = p3.load_adapter("path to this folder", model)
logits = model(input_ids, lora=lora)
```
"""
