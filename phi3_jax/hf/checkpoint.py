"""A checkpoint's weights: Hugging Face's safetensors to stacked device arrays, and back.

On disk every layer has its own tensors, `model.layers.{i}.mlp.down_proj.weight`; the model holds all
layers' in one array, `[L, out, in]` at `model.layers.mlp.down_proj.weight`. Each tensor is read from
the file straight into its place in the stacked array, and on CPUs the device takes that very memory,
so that the converted weights are the only copy.
"""

import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf import bnb
from phi3_jax.hf.files import CONFIG, INDEX, SINGLE, Weights, read_weights
from phi3_jax.hf.hub import resolve_checkpoint
from phi3_jax.hf.layout import EMBEDDING, HEAD, Slot, abstract_model, checkpoint_slots, model_leaves
from phi3_jax.hf.read import Shardings, aligned_empty, fused_rows, read_parts, read_sharded, read_whole, share
from phi3_jax.hf.safetensors_io import FLOATS, TensorEntry, TensorSource, equals, read_tensor, write_safetensors
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import SplitWeight
from phi3_jax.parallel.distributed import barrier, is_main, to_host, together
from phi3_jax.quant import Quantized, Quantizer, is_quantized, make_quantizer
from phi3_jax.quant.quantize import is_quantizable, stack_layers
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, temporary_folder

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any,
    quantization: str | None = None,
    double_quant: bool = True,
    quantizer: Quantizer | None = None,
    attention: str = "auto",
    shardings: Shardings | None = None,
    parts: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Phi3ForCausalLM:
    """The model of a checkpoint folder or hub id, its weights converted to `dtype`.

    Host memory holds, beside what the device holds, no more than one stacked array, and of weights
    that are quantised no more than a few layers' in `dtype`. What bitsandbytes has quantised is loaded
    as it is.

    **Arguments**
    - `quantization`: `nf4` or `int8`: what the decoder layers' linear weights are quantised to while
      they are read, after they are rounded to `dtype`.
    - `double_quant`: that the statistics of NF4 are quantised too.
    - `quantizer`: takes the place of these two, for starts that look at each weight before it is
      rounded (LoftQ). It is called with a module's name in the checkpoint and its weight, from several
      threads at once, and gives a quantised weight of numpy arrays.
    - `attention`: the model's kernel, see `model.attention.attend`.

    Raises `InputError` with everything that is wrong with the checkpoint at once: missing, unknown,
    doubled and misshapen tensors, shards that are missing or cut off. Also for a checkpoint that is
    quantised already, otherwise than asked for.
    """
    dtype = _float_dtype(dtype)
    if quantization is not None and quantizer is None:
        quantizer = make_quantizer(quantization, double_quant=double_quant)
    folder = resolve_checkpoint(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = read_config(folder)
    stored = bnb.read_bnb_config(config, folder / CONFIG)
    if stored is not None and quantizer is not None:
        _check_stored(stored, folder, quantization, double_quant)
    weights = read_weights(folder, config)
    weights.raise_for_problems(folder)
    empty = abstract_model(config, dtype, attention)
    slots: dict[tuple[str, ...], list[Slot]] = {}
    for slot in checkpoint_slots(config):
        slots.setdefault(slot.path, []).append(slot)
    leaves = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, leaf in model_leaves(empty).items():
            sharding = None if shardings is None else partial(shardings, path)
            read: Callable[[Slot], Quantized] | None = None
            if stored is not None and path in stored.paths:
                read = partial(_read_stored, weights, stored)
            elif stored is None and quantizer is not None and is_quantizable(path, leaf.shape):
                read = partial(_quantized, weights, dtype, quantizer)
            value: Any
            if read is not None:
                value = stack_layers(pool.map(read, slots[path]), len(slots[path]), path, aligned_empty)
                value = value if sharding is None else share(value, sharding)
            elif sharding is None:
                value = read_whole(pool, slots[path], weights.tensors, dtype)
            elif parts and (rows := fused_rows(empty, path)) is not None:
                value = read_parts(pool, slots[path], weights.tensors, dtype, sharding, rows)
            else:
                value = read_sharded(pool, slots[path], weights.tensors, dtype, sharding)
            if path == EMBEDDING and config.tie_word_embeddings and HEAD in weights.tensors:
                _check_tied(weights.tensors[HEAD], value)
            if sharding is None:
                value = jax.device_put(value)
            # Waiting frees the host's copy before the next one is made.
            leaves.append((path, leaf.replace(jax.block_until_ready(value))))
    return nnx.merge(nnx.graphdef(empty), nnx.from_flat_state(leaves))


def _check_stored(stored: bnb.BnbConfig, folder: Path, quantization: str | None, double_quant: bool) -> None:
    found = f"{stored.kind}{' with double quantisation' if stored.double_quant else ''}"
    if quantization != stored.kind or (stored.double_quant and not double_quant):
        wanted = quantization if double_quant else f"{quantization} without double quantisation"
        raise InputError(
            f"{folder}: is quantised already, to {found}, and cannot be to {wanted}; leave that out, or give the "
            "unquantised checkpoint"
        )


def _read_stored(weights: Weights, stored: bnb.BnbConfig, slot: Slot) -> Quantized:
    return bnb.read_weight(weights.tensors, slot, stored)


def _quantized(weights: Weights, dtype: np.dtype, quantizer: Quantizer, slot: Slot) -> Quantized:
    weight = np.empty(slot.shape, dtype)
    read_tensor(weights.tensors[slot.name], weight)
    return quantizer(slot.name.removesuffix(".weight"), weight)


def read_config(folder: Path) -> Phi3Config:
    """The configuration of a checkpoint folder that this package can load."""
    if not (folder / CONFIG).exists() and (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter, no model; give its base model, and load the adapter beside it")
    return Phi3Config.from_pretrained(folder)


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    if result not in FLOATS.values():
        raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return result


def _check_tied(head: TensorEntry, embedding: np.ndarray | jax.Array) -> None:
    whole = (slice(None),) * 2
    shares = [(whole, embedding)]
    if isinstance(embedding, jax.Array):
        shares = list({str(shard.index): (shard.index, shard.data) for shard in embedding.addressable_shards}.values())
    if not all(equals(head, np.asarray(share), index) for index, share in shares):
        raise InputError(
            f"{head.path}: {HEAD} differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there"
        )
    logger.info("%s: %s repeats the tied embedding and is left out", head.path, HEAD)


def save_model(
    model: Phi3ForCausalLM, folder: str | Path, *, tokenizer: Any = None, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes safetensors files, named and sharded as transformers does, and both JSON configurations.

    Everything is written beside first and moved when it is whole, config.json last: a folder that
    a crash left unfinished does not look like a checkpoint. An earlier checkpoint of the same
    kind is replaced.

    **Arguments**
    - `tokenizer`: saved along where given (anything with transformers' `save_pretrained`).
    - `max_shard_size`: bytes.

    Several processes must all call it: the first one writes, and the others give what their devices
    hold, a tensor at a time.

    Raises `InputError` where the folder holds something else that would be in the way, and `StorageError`
    where it cannot be written.
    """
    folder = Path(folder)
    if max_shard_size < 1:
        raise InputError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    # Before anything is written, and by all: what this raises is raised in all of them.
    shards, config = _shards(model, max_shard_size), _config_json(model)
    with together():
        if is_main():
            _check_target(folder)
    if not is_main():
        for tensor in itertools.chain.from_iterable(shards):
            tensor.read()
    else:
        nbytes = sum(tensor.nbytes for tensor in itertools.chain.from_iterable(shards))
        with storing(folder, nbytes), temporary_folder(folder, ".saving-") as staging:
            names = _write_files(model, shards, config, staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            _replace(folder, staging, names)
    barrier(f"{folder} is written")


def _replace(folder: Path, staging: Path, names: list[str]) -> None:
    """**Arguments**: `names`, of the model's files, config.json last; whatever else there is goes first."""
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


def _shards(model: Phi3ForCausalLM, max_shard_size: int) -> list[list[TensorSource]]:
    """What each file is to hold."""
    arrays = {path: leaf.get_value() for path, leaf in model_leaves(model).items()}
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for slot in checkpoint_slots(model.config):
        tensors = _sources(slot, arrays[slot.path])
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += nbytes
    return shards


def _write_files(
    model: Phi3ForCausalLM, shards: list[list[TensorSource]], config: dict[str, Any], folder: Path
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
    if model.config.generation != "{}":
        _write_json(folder / GENERATION, json.loads(model.config.generation))
        names.append(GENERATION)
    _write_json(folder / CONFIG, config)
    return [*names, CONFIG]


def _sources(slot: Slot, value: Any) -> list[TensorSource]:
    if is_quantized(value):
        return bnb.tensor_sources(slot, value)
    arrays = value.parts if isinstance(value, SplitWeight) else (value,)
    return [TensorSource(slot.name, arrays[0].dtype, slot.shape, partial(_on_host, arrays, slot.layer))]


def _on_host(arrays: tuple[jax.Array, ...], layer: int | None) -> np.ndarray:
    # Sliced before it comes to the host: jax keeps the host's copy of an array that it has fetched.
    parts = [to_host(array if layer is None else array[layer]) for array in arrays]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _config_json(model: Phi3ForCausalLM) -> dict[str, Any]:
    arrays = {path: leaf.get_value() for path, leaf in model_leaves(model).items()}
    raw = model.config.to_dict()
    raw.pop("auto_map", None)  # names Python files that do not go along
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.dtype)  # `dtype` is its new name; every release reads the old one
    quantization = bnb.config_section(arrays, str(model.dtype), raw.pop("quantization_config", None))
    return raw if quantization is None else {**raw, "quantization_config": quantization}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
