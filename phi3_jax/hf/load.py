"""A checkpoint's weights, read from its files straight to where they are to lie.

On disk every layer has its own tensors, `model.layers.{i}.mlp.down_proj.weight`; the model holds all
layers' in one array, `[L, out, in]` at `model.layers.mlp.down_proj.weight`. Each tensor is read from
the file straight into its place in the stacked array, and on CPUs the device takes that very memory,
so that the converted weights are the only copy. Accelerators, and hosts that share the reading, get it
layer by layer instead (`stacking`).
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.bnb import BnbConfig, read_weight
from phi3_jax.hf.files import Weights
from phi3_jax.hf.finite import read_finite
from phi3_jax.hf.layout import EMBEDDING, HEAD, LayoutEntry, checkpoint_layout
from phi3_jax.hf.safetensors_io import TensorEntry, equals
from phi3_jax.hf.stacking import Places, Stack, divided, fill, gathered, is_by_layers
from phi3_jax.model.leaves import LeafPath
from phi3_jax.quant import Quantized, Quantizer
from phi3_jax.quant.build import Leaf
from phi3_jax.quant.quantize import check_kind, is_quantizable, stack_layers
from phi3_jax.system.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of memory that it takes over without a copy

# (path in the model's state, shape) -> how an array of that leaf lies. A leaf may have several: those
# of a quantised weight, or the parts of a split one.
Shardings = Callable[[LeafPath, tuple[int, ...]], Sharding]


@dataclass(frozen=True)
class WeightFiles:
    """The files of a checkpoint as the source of a model's leaves.

    No more than one leaf is on the host at a time, and where the devices have memory of their own a few layers of it.

    Attributes:
        config: The checkpoint's.
        weights: What its files hold.
        stored: How they are quantised; None where they are not.
        dtype: What weights are converted to.
        quantizer: What quantises them while they are read, if anything.
        shardings: How devices share them; None where one device has all.
        pool: The threads that read.
    """

    config: Phi3Config
    weights: Weights
    stored: BnbConfig | None
    dtype: np.dtype
    quantizer: Quantizer | None
    shardings: Shardings | None
    pool: ThreadPoolExecutor

    def quantizes(self, path: LeafPath, leaf: Leaf) -> bool:
        if self.stored is not None:
            return path in self.stored.paths
        return self.quantizer is not None and is_quantizable(path, leaf.shape)

    def quantized(self, path: LeafPath, leaf: Leaf) -> Quantized:
        """The layers' weights as they are stored, or quantised a few at a time."""
        entries = self._entries(path)
        platform = platform_of(self.shardings, path, leaf.shape)
        if is_by_layers(self._where(path, leaf.shape)):
            return self._quantized_by_layers(path, entries, platform)
        layers = self.pool.map(lambda entry: self._layer(entry).laid_out(platform), entries)
        stacked = stack_layers(layers, len(entries), path, aligned_empty)
        return _ready(jax.device_put(stacked) if self.shardings is None else share(stacked, path, self.shardings))

    def _where(self, path: LeafPath, shape: tuple[int, ...]) -> Sharding | None:
        return None if self.shardings is None else self.shardings(path, shape)

    def _quantized_by_layers(self, path: LeafPath, entries: Sequence[LayoutEntry], platform: str) -> Quantized:
        parts, kind = jax.tree.flatten(self._layer(entries[0]).laid_out(platform))
        wheres = [self._where(path, (len(entries), *part.shape)) for part in parts]
        stack = Stack(len(entries), [part.shape for part in parts], [part.dtype for part in parts], wheres)

        def cut(layer: int, places: Places) -> list[list[np.ndarray]]:
            if layer == 0:
                found, its_kind = parts, kind
            else:
                found, its_kind = jax.tree.flatten(self._layer(entries[layer]).laid_out(platform))
            check_kind(its_kind, kind, path, layer)
            return [[array[index] for index in places.indices(number)] for number, array in enumerate(found)]

        value: Quantized = jax.tree.unflatten(kind, fill(stack, cut, self.pool))
        return value

    def _layer(self, entry: LayoutEntry) -> Quantized:
        if self.stored is not None:
            return read_weight(self.weights.tensors, entry, self.stored)
        assert self.quantizer is not None
        weight = np.empty(entry.shape, self.dtype)
        read_finite(self.weights.tensors[entry.name], weight)
        return self.quantizer(entry.name.removesuffix(".weight"), weight)

    def dense(self, path: LeafPath, leaf: Leaf, rows: slice | None = None) -> Array:
        """The layers' tensors stacked, or the one that there is; on a mesh each host reads what its devices hold."""
        entries = self._entries(path)
        first, last, _ = (rows or slice(None)).indices(entries[0].shape[0])
        shape: tuple[int, ...] = (last - first, *entries[0].shape[1:])
        if entries[0].layer is not None:
            shape = len(entries), *shape
        where = self._where(path, shape)
        if entries[0].layer is not None and is_by_layers(where):
            return self._dense_by_layers(entries, shape[1:], where, first)
        value: Array | np.ndarray
        if where is None:
            value = self._read(entries, tuple((0, size) for size in shape), first)
        else:
            value = gathered(self._read_shared(entries, shape, divided(where, shape), first), where)
        if path == EMBEDDING and self.config.tie_word_embeddings and HEAD in self.weights.tensors:
            _check_tied(self.weights.tensors[HEAD], value)
        return _ready(jax.device_put(value) if isinstance(value, np.ndarray) else value)

    def _dense_by_layers(
        self, entries: Sequence[LayoutEntry], shape: tuple[int, ...], where: Sharding | None, first_row: int
    ) -> Shaped[Array, "*shape"]:
        stack = Stack(len(entries), [shape], [self.dtype], [where])

        def cut(layer: int, places: Places) -> list[list[np.ndarray]]:
            found = []
            for rows, *others in places.indices(0):
                of_tensor = slice(first_row + rows.start, first_row + rows.stop)
                sizes = (part.stop - part.start for part in (rows, *others))
                array = aligned_empty(tuple(sizes), self.dtype)
                self._fill(entries[layer], array, (of_tensor, *others))
                found.append(array)
            return [found]

        (value,) = fill(stack, cut, self.pool)
        return value

    def _entries(self, path: LeafPath) -> list[LayoutEntry]:
        return [entry for entry in checkpoint_layout(self.config) if entry.path == path]

    def _read_shared(
        self, entries: Sequence[LayoutEntry], shape: tuple[int, ...], where: Sharding, first_row: int
    ) -> Shaped[Array, "*shape"]:
        """The leaf as devices share it: what this host's devices hold is read once, a device's share at a time."""
        holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in where.addressable_devices_indices_map(shape).items():
            assert index is not None
            bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        shards: list[Array] = []
        for bounds, devices in holders.items():
            host = self._read(entries, bounds, first_row)
            shards += [jax.device_put(host, device) for device in devices]
            _ready(shards)
        return jax.make_array_from_single_device_arrays(shape, where, shards)

    def _read(
        self, entries: Sequence[LayoutEntry], bounds: Sequence[tuple[int, int]], first_row: int
    ) -> Shaped[np.ndarray, "*shape"]:
        """What of the leaf is within `bounds`, for each axis; its rows are counted from `first_row` of a tensor."""
        array = aligned_empty(tuple(stop - start for start, stop in bounds), self.dtype)
        layers: Sequence[np.ndarray] = [array]
        if entries[0].layer is not None:
            (start, stop), *bounds = bounds
            entries, layers = entries[start:stop], list(array)
        (start, stop), *others = bounds
        index = (slice(first_row + start, first_row + stop), *(slice(*ends) for ends in others))
        jobs = [self.pool.submit(self._fill, entry, layer, index) for entry, layer in zip(entries, layers, strict=True)]
        for job in jobs:
            job.result()
        return array

    def _fill(self, entry: LayoutEntry, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Reads a tensor, or the part at `index`; one that is quantised where other layers' are not is made dense."""
        if self.stored is None or entry.name not in self.stored.mixed:
            read_finite(self.weights.tensors[entry.name], out, index)
            return
        out[...] = read_weight(self.weights.tensors, entry, self.stored).dequantize(out.dtype)[index]


def _ready(value: T) -> T:
    """The value once it is there: waiting frees the host's copy before the next one is made."""
    for array in jax.tree.leaves(value):
        array.block_until_ready()
    return value


def platform_of(shardings: Shardings | None, path: LeafPath, shape: tuple[int, ...]) -> str:
    """`cpu`, `gpu` or `tpu`: that of the devices which are to hold a leaf."""
    if shardings is None:
        return jax.default_backend()
    device: jax.Device = next(iter(shardings(path, shape).device_set))
    return "gpu" if device.platform in ("cuda", "rocm") else str(device.platform)


def share(value: Quantized, path: LeafPath, shardings: Shardings) -> Quantized:
    """A quantised weight of numpy arrays, which every host has whole, as devices share each of its arrays."""

    def put(array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, shardings(path, array.shape), lambda index: array[index])

    shared: Quantized = jax.tree.map(put, value)
    return shared


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that the CPU backend can take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_tied(head: TensorEntry, embedding: np.ndarray | Array) -> None:
    whole = (slice(None),) * 2
    shares: list[tuple[tuple[slice, ...], np.ndarray | Array]] = [(whole, embedding)]
    if isinstance(embedding, jax.Array):
        shares = list({str(shard.index): (shard.index, shard.data) for shard in embedding.addressable_shards}.values())
    if not all(equals(head, np.asarray(share), index) for index, share in shares):
        raise InputError(
            f"{head.path}: {HEAD} differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there"
        )
    logger.info("%s: %s repeats the tied embedding and is left out", head.path, HEAD)
