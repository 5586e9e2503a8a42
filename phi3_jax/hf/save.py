"""A model's weights and configuration, written as transformers writes them."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from phi3_jax.config.model import Phi3Config
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.hf import bnb
from phi3_jax.hf.files import CONFIG, INDEX, SINGLE
from phi3_jax.hf.layout import LayoutEntry, checkpoint_layout
from phi3_jax.hf.safetensors_io import TensorSource, write_safetensors
from phi3_jax.hf.save_tokenizer import save_tokenizer
from phi3_jax.model.layers import SplitWeight
from phi3_jax.model.leaves import model_leaves
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.distributed import barrier, is_main, to_host, together
from phi3_jax.quant import Quantized
from phi3_jax.quant.build import LeafValue
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, temporary_folder

GENERATION = "generation_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_model(
    model: Phi3ForCausalLM, folder: str | Path, *, tokenizer: Tokenizer | None = None, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes safetensors files, named and sharded as transformers does, and both JSON configurations.

    Everything is written beside first and moved when it is whole, config.json last: a folder that
    a crash left unfinished does not look like a checkpoint. An earlier checkpoint of the same
    kind is replaced.

    Several processes must all call it: the first one writes, and the others give what their devices
    hold, a tensor at a time.

    Args:
        model: What to write, quantised or not.
        folder: Where to.
        tokenizer: Saved along where given, with the licence of the checkpoint that it came with.
        max_shard_size: Bytes of a file at most.

    Raises:
        InputError: Where the folder holds something else that would be in the way.
        StorageError: Where it cannot be written.
    """
    arrays = {path: leaf.get_value() for path, leaf in model_leaves(model).items()}
    tensors = [_sources(entry, arrays[entry.path]) for entry in checkpoint_layout(model.config)]
    stored = bnb.config_section(arrays, str(model.dtype), model.config.to_dict().get("quantization_config"))
    write_checkpoint(
        folder,
        tensors,
        config_json(model.config, str(model.dtype), stored),
        generation=model.config.generation,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
    )


def write_checkpoint(
    folder: str | Path,
    tensors: Sequence[list[TensorSource]],
    config: Mapping[str, object],
    *,
    generation: str = "{}",
    tokenizer: Tokenizer | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """The same of any tensors.

    Args:
        folder: Where to.
        tensors: What to write, that which belongs in one file in a list of its own.
        config: What config.json is to say.
        generation: Text of generation_config.json.
        tokenizer: As in `save_model`.
        max_shard_size: As there.

    Raises:
        InputError: As there.
        StorageError: As there.
    """
    folder = Path(folder)
    if max_shard_size < 1:
        raise InputError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    shards = _shards(tensors, max_shard_size)
    with together():
        if is_main():
            _check_target(folder)
    if not is_main():
        for tensor in itertools.chain.from_iterable(shards):
            tensor.read()
    else:
        nbytes = sum(tensor.nbytes for tensor in itertools.chain.from_iterable(shards))
        with storing(folder, nbytes), temporary_folder(folder, ".saving-") as staging:
            names = _write_files(shards, config, generation, staging)
            if tokenizer is not None:
                save_tokenizer(tokenizer, staging, licence=True)
            _replace(folder, staging, names)
    barrier(f"{folder} is written")


def _replace(folder: Path, staging: Path, names: list[str]) -> None:
    """Moves what was written into place: the files of `names`, the model's, last and in this order."""
    (folder / CONFIG).unlink(missing_ok=True)
    for old in folder.iterdir():
        if old.name in (SINGLE, INDEX, GENERATION) or SHARD.fullmatch(old.name):
            old.unlink()
    others = [path.name for path in staging.iterdir() if path.name not in names]
    for name in (*others, *names):
        if (staging / name).is_dir():  # a tokenizer's further chat templates
            shutil.rmtree(folder / name, ignore_errors=True)
        (staging / name).replace(folder / name)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder to save the model in")
    # transformers follows adapter_config.json to another base model, whatever weights lie beside it.
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter; save the model in a folder of its own")
    if (folder / CONFIG).exists():
        try:
            Phi3Config.from_pretrained(folder)
        except InputError as error:
            raise InputError(f"{folder}: holds another model's config.json; save in a folder of its own") from error


def _shards(tensors: Sequence[list[TensorSource]], max_shard_size: int) -> list[list[TensorSource]]:
    """What each file is to hold."""
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for group in tensors:
        nbytes = sum(tensor.nbytes for tensor in group)
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1] += group
        size += nbytes
    return shards


def _write_files(
    shards: list[list[TensorSource]], config: Mapping[str, object], generation: str, folder: Path
) -> list[str]:
    """Writes all files; returns their names in the order in which they should appear."""
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    if len(shards) > 1:
        everything = list(itertools.chain.from_iterable(shards))
        where = {t.name: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
        metadata = {
            "total_parameters": sum(math.prod(t.shape) for t in everything),
            "total_size": sum(t.nbytes for t in everything),
        }
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
        names.append(INDEX)
    if generation != "{}":
        _write_json(folder / GENERATION, json.loads(generation))
        names.append(GENERATION)
    _write_json(folder / CONFIG, config)
    return [*names, CONFIG]


def _sources(entry: LayoutEntry, value: LeafValue) -> list[TensorSource]:
    if isinstance(value, Quantized):
        return bnb.tensor_sources(entry, value)
    arrays = value.parts if isinstance(value, SplitWeight) else (value,)
    return [TensorSource(entry.name, arrays[0].dtype, entry.shape, partial(_on_host, arrays, entry.layer))]


def _on_host(arrays: tuple[jax.Array, ...], layer: int | None) -> np.ndarray:
    # Sliced before it comes to the host: jax keeps the host's copy of an array that it has fetched.
    parts = [to_host(array if layer is None else array[layer]) for array in arrays]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def config_json(config: Phi3Config, dtype: str, quantization: Mapping[str, object] | None = None) -> dict[str, object]:
    """What config.json is to say of a model.

    Args:
        config: The model's.
        dtype: Of its weights.
        quantization: Its `quantization_config`, if any.
    """
    raw = config.to_dict()
    for name in ("auto_map", "dtype", "quantization_config"):  # the first names Python files that do not go along
        raw.pop(name, None)
    raw["torch_dtype"] = dtype  # `dtype` is its new name; every release reads the old one
    return raw if quantization is None else {**raw, "quantization_config": quantization}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
