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
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.config import Phi3Config
from phi3_jax.errors import InputError
from phi3_jax.hf.hub import resolve_checkpoint
from phi3_jax.hf.safetensors_io import (
    FLOATS,
    TensorEntry,
    TensorSource,
    equals,
    read_header,
    read_tensor,
    unique_keys,
    write_safetensors,
)
from phi3_jax.model.phi3 import Phi3ForCausalLM

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEAD, EMBEDDING = "lm_head.weight", ("model", "embed_tokens", "weight")
# Tables that transformers before 4.31 stored and nobody reads: they follow from config.json.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of memory that it takes over without a copy


@dataclass(frozen=True)
class Slot:
    """A tensor on disk, and its place in the model's state: all of the array at `path`, or a layer."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class Weights:
    """What the files of a checkpoint hold, by name, and all that is wrong with that, one kind a string."""

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    problems: tuple[str, ...]

    def raise_for_problems(self, folder: Path) -> None:
        """Raises `InputError` that tells all of them, if there are any."""
        if self.problems:
            raise InputError(
                f"{folder}: {'; '.join(self.problems)}; give the whole checkpoint that config.json speaks of"
            )


def abstract_model(config: Phi3Config, dtype: Any = jnp.float32) -> Phi3ForCausalLM:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _leaves(model: Phi3ForCausalLM) -> dict[tuple[str, ...], nnx.Variable]:
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def checkpoint_slots(config: Phi3Config) -> list[Slot]:
    """Every tensor of such a model's checkpoint, in the order of the layers."""
    outer, layers = [], []
    for path, leaf in _leaves(abstract_model(config)).items():
        if path[:2] == ("model", "layers"):
            inner = ".".join(path[2:])
            layers += [Slot(f"model.layers.{i}.{inner}", leaf.shape[1:], path, i) for i in range(leaf.shape[0])]
        else:
            outer.append(Slot(".".join(path), leaf.shape, path, None))
    layers.sort(key=lambda slot: slot.layer or 0)
    outer.sort(key=lambda slot: slot.path != EMBEDDING)
    return [*outer[:1], *layers, *outer[1:]]


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Phi3ForCausalLM:
    """The model of a checkpoint folder or hub id, its weights converted to `dtype`.

    Host memory holds, beside what the device holds, no more than one stacked array.

    Raises `InputError` with everything that is wrong with the checkpoint at once: missing, unknown,
    doubled and misshapen tensors, shards that are missing or cut off.
    """
    dtype = _float_dtype(dtype)
    folder = resolve_checkpoint(
        path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = read_config(folder)
    weights = read_weights(folder, config)
    weights.raise_for_problems(folder)
    empty = abstract_model(config, dtype)
    slots: dict[tuple[str, ...], list[Slot]] = {}
    for slot in checkpoint_slots(config):
        slots.setdefault(slot.path, []).append(slot)
    leaves = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, leaf in _leaves(empty).items():
            array = _aligned_empty(leaf.shape, dtype)
            jobs = [
                pool.submit(read_tensor, weights.tensors[slot.name], array if slot.layer is None else array[slot.layer])
                for slot in slots[path]
            ]
            for job in jobs:
                job.result()
            if path == EMBEDDING and config.tie_word_embeddings and HEAD in weights.tensors:
                _check_tied(weights.tensors[HEAD], array)
            # Waiting frees the host's copy before the next one is made.
            leaves.append((path, leaf.replace(jax.device_put(array).block_until_ready())))
    return nnx.merge(nnx.graphdef(empty), nnx.from_flat_state(leaves))


def read_config(folder: Path) -> Phi3Config:
    """The configuration of a checkpoint folder that this package can load."""
    if not (folder / CONFIG).exists() and (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter, no model; give its base model, and load the adapter beside it")
    config = Phi3Config.from_pretrained(folder)
    quantization = json.loads(config.source).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"{folder}: its weights are quantized ({method!r}), which is not supported yet; "
            "give the float16, bfloat16 or float32 checkpoint"
        )
    return config


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    if result not in FLOATS.values():
        raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
    return result


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_tied(head: TensorEntry, embedding: np.ndarray) -> None:
    if not equals(head, embedding):
        raise InputError(
            f"{head.path}: {HEAD} differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there"
        )
    logger.info("%s: %s repeats the tied embedding and is left out", head.path, HEAD)


def read_weights(folder: Path, config: Phi3Config) -> Weights:
    """Reads the headers of the folder's safetensors files and holds them against `config`.

    Raises `InputError` where there are no safetensors files, or their index cannot be read; all
    other problems are returned.
    """
    index = _read_index(folder)
    files, problems = _shards(folder, index)
    tensors: dict[str, TensorEntry] = {}
    broken, doubled, misplaced = [], [], []
    readable = []
    for file in files:
        try:
            entries = read_header(file)
        except InputError as error:
            broken.append(str(error).removeprefix(f"{folder}{os.sep}"))
            continue
        readable.append(file.name)
        doubled += [name for name in entries if name in tensors]
        misplaced += [name for name in entries if index is not None and index.get(name) != file.name]
        tensors.update(entries)
    # What a lost shard should hold is not missing besides.
    lost = {name for name, file in (index or {}).items() if file not in readable}
    if not readable and index is None:
        lost = {slot.name for slot in checkpoint_slots(config)}
    problems += _listed("unreadable files", broken)
    problems += _listed("tensors in two files", doubled)
    problems += _listed("tensors that the index places elsewhere or not at all", misplaced)
    problems += _compare(checkpoint_slots(config), tensors, lost, config.tie_word_embeddings)
    return Weights(tuple(files), tensors, tuple(problems))


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's weight map; None for a single file, which goes first, as in transformers."""
    if (folder / SINGLE).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles or (folder / "pytorch_model.bin.index.json").exists():
            raise InputError(
                f"{folder}: its weights are pickles ({', '.join(pickles[:3]) or 'pytorch_model.bin'}), which can run "
                "code and are never opened; convert them to safetensors"
            )
        raise InputError(f"{folder}: no weights in it; expected {SINGLE} or {INDEX}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("no weight_map from tensor names to file names")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no proper index ({error}); download it again") from error
    return weight_map


def _shards(folder: Path, index: Mapping[str, str] | None) -> tuple[list[Path], list[str]]:
    """The files to read, and what is wrong with those that the index names."""
    if index is None:
        return [folder / SINGLE], []
    names = sorted(set(index.values()))
    # A plain name and nothing else: an index must not lead out of its folder, nor to a pickle.
    proper = [name for name in names if re.fullmatch(r"[\w][\w.-]*\.safetensors", name)]
    present = [name for name in proper if (folder / name).is_file()]
    problems = _listed(
        "file names in the index that are no safetensors file beside it", sorted(set(names) - set(proper))
    )
    problems += _listed("missing shards", sorted(set(proper) - set(present)))
    return [folder / name for name in present], problems


def _compare(slots: Sequence[Slot], tensors: Mapping[str, TensorEntry], lost: set[str], tied: bool) -> list[str]:
    expected = {slot.name: slot.shape for slot in slots}
    if tied and HEAD in tensors:
        expected[HEAD] = expected[".".join(EMBEDDING)]
    missing = [name for name in expected if name not in tensors and name not in lost]
    unknown = [name for name in tensors if name not in expected]
    harmless = [name for name in unknown if HARMLESS.fullmatch(name)]
    if harmless:
        logger.info("left out, since config.json says the same: %s", _listed("tensors", harmless)[0])
    both = [(tensors[name], shape) for name, shape in expected.items() if name in tensors]
    shapes = [f"{e.name} is {list(e.shape)}, expected {list(shape)}" for e, shape in both if e.shape != shape]
    dtypes = [f"{e.name} is {e.dtype}" for e, _ in both if e.dtype not in FLOATS]
    hint = "; is config.json's tie_word_embeddings to be true?" if missing == [HEAD] else ""
    return [
        *(text + hint for text in _listed("missing tensors", missing)),
        *_listed("unknown tensors", [name for name in unknown if name not in harmless]),
        *_listed("wrong shapes", shapes),
        *_listed("dtypes other than F32, F16 and BF16", dtypes),
    ]


def _listed(kind: str, items: Iterable[str]) -> list[str]:
    """`["3 missing tensors (a, b, c)"]`, or nothing; bounded, and on one line whatever a file holds."""
    items = list(items)
    if not items:
        return []
    shown = [item if item.isprintable() else repr(item) for item in items[:5]]
    more = ", ..." if len(items) > 5 else ""
    return [f"{len(items)} {kind} ({', '.join(text[:300] for text in shown)}{more})"]


def save_model(model: Phi3ForCausalLM, folder: str | Path, *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes safetensors files, named and sharded as transformers does, and both JSON configurations.

    Everything is written beside first and moved when it is whole, config.json last: a folder that
    a crash left unfinished does not look like a checkpoint. An earlier checkpoint of the same
    kind is replaced.

    **Arguments**: `max_shard_size`, bytes.

    Raises `InputError` where the folder holds something else that would be in the way.
    """
    folder = Path(folder)
    if max_shard_size < 1:
        raise InputError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    _check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        names = _write_files(model, staging, max_shard_size)
        (folder / CONFIG).unlink(missing_ok=True)
        for old in folder.iterdir():
            if old.name in (SINGLE, INDEX, GENERATION) or SHARD.fullmatch(old.name):
                old.unlink()
        for name in names:
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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


def _write_files(model: Phi3ForCausalLM, folder: Path, max_shard_size: int) -> list[str]:
    """Writes all files; returns their names in the order in which they should appear."""
    arrays = {path: leaf.get_value() for path, leaf in _leaves(model).items()}
    shards: list[list[TensorSource]] = [[]]
    size = 0
    for slot in checkpoint_slots(model.config):
        array = arrays[slot.path]
        tensor = TensorSource(slot.name, array.dtype, slot.shape, partial(_on_host, array, slot.layer))
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_safetensors(folder / name, tensors)
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
    _write_json(folder / CONFIG, _config_json(model))
    return [*names, CONFIG]


def _on_host(array: jax.Array, layer: int | None) -> np.ndarray:
    # Sliced before it comes to the host: jax keeps the host's copy of an array that it has fetched.
    return np.asarray(array if layer is None else array[layer])


def _config_json(model: Phi3ForCausalLM) -> dict[str, Any]:
    raw = model.config.to_dict()
    raw.pop("auto_map", None)  # names Python files that do not go along
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.dtype)  # `dtype` is its new name; every release reads the old one
    return raw


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
