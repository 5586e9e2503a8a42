"""Adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax.hf.hub import resolve_checkpoint
from phi3_jax.hf.safetensors_io import FLOATS, TensorEntry, read_header, read_metadata, read_tensor, write_safetensors
from phi3_jax.lora.base_weights import weight_shape
from phi3_jax.lora.targets import saved_modules
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.peft.card import model_card
from phi3_jax.peft.config import CONFIG_FILE, config_entries, read_adapter_config
from phi3_jax.peft.targets import peft_modules
from phi3_jax.peft.tensors import PREFIX, from_peft, peft_adapters, saved_names, sources, tensor_names, to_peft
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, temporary_folder

__all__ = ["load_adapter", "read_adapter_config", "save_adapter"]

WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(
    folder: str | Path,
    lora: Lora,
    *,
    tokenizer: Any = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads: config, float32 weights, a model card.

    Everything is written for the base as it is: adapters of slices as one of the fused layer, adapters
    that started as PiSSA, OLoRA or LoftQ as a plain one of twice the rank.

    An adapter that is in the folder already is replaced; should that be interrupted, the folder is
    left without adapter_config.json, so that nobody loads old and new mixed.

    **Arguments**
    - `tokenizer`: saved along where given (anything with transformers' `save_pretrained`).
    - `base_model_name_or_path`: what `AutoPeftModelForCausalLM` will look for; default: that of
      `lora.config`.

    Raises `StorageError` where the folder cannot be written, and `InputError` for adapters that no
    configuration of PEFT describes.
    """
    folder = Path(folder)
    base = base_model_name_or_path or lora.config.base_model_name_or_path
    modules, config, metadata = to_peft(lora)
    tensors = list(sources(modules, lora.saved))
    entries = config_entries(config, base)
    card = model_card(config, sum(math.prod(tensor.shape) for tensor in tensors), base)
    weights = sum(tensor.nbytes for tensor in tensors)
    with storing(folder, weights), temporary_folder(folder.parent, f".{folder.name}.") as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, tensors, metadata)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / CONFIG_FILE).write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")
        _move(temporary, folder)


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

    It becomes what `init_lora` makes for such a configuration; an adapter of a fused layer that is made
    of slices becomes those of the slices.

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
        adapters = peft_adapters(model, config, peft_modules(model, config))
        saved = saved_modules(model, config.modules_to_save or ())
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    arrays = _read_tensors(path, model, _expected_shapes(model, adapters, saved))
    num_layers = model.config.num_hidden_layers
    weights = {name: [arrays[tensor] for tensor in saved_names(name, num_layers)] for name in saved}
    return from_peft(
        model,
        config,
        {name: _filled(name, adapter, arrays) for name, adapter in adapters.items()},
        {name: np.stack(w) if name.startswith("model.layers.") else w[0] for name, w in weights.items()},
        read_metadata(path),
    )


def _filled(name: str, adapter: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    return replace(adapter, **{field: arrays[tensor] for field, tensor in tensor_names(name, adapter).items()})


def _expected_shapes(
    model: Phi3ForCausalLM, adapters: Mapping[str, Any], saved: list[str]
) -> dict[str, tuple[int, ...]]:
    expected = {
        tensor: getattr(adapter, field).shape
        for name, adapter in adapters.items()
        for field, tensor in tensor_names(name, adapter).items()
    }
    for name in saved:
        shape = weight_shape(model, name)
        stacked = name.startswith("model.layers.")
        for tensor in saved_names(name, model.config.num_hidden_layers):
            expected[tensor] = shape[1:] if stacked else shape
    return expected


def _read_tensors(path: Path, model: Phi3ForCausalLM, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    entries = read_header(path)
    # PEFT saves the untouched table along where embedding or output head have an adapter.
    base_copies = {n: entry for n, entry in entries.items() if n in _base_weight_names() and n not in expected}
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
        "not the base's, though modules_to_save does not name them": [
            name for name, entry in base_copies.items() if not _is_base_weight(entry, model)
        ],
    }
    _raise_for(path, problems)
    return arrays


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
    weight = (head if head is not None and ".lm_head." in entry.name else table).weight.get_value()
    if not isinstance(weight, jax.Array):
        raise InputError(
            f"{entry.path}: holds a copy of the base's embeddings, which cannot be compared with a base that is not "
            "loaded; save the adapter without (PEFT's save_embedding_layers=False)"
        )
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
