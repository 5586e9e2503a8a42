"""A leaf of the model's state, read from a checkpoint's files to where it is to lie."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped

from phi3_jax.hf.layout import Slot
from phi3_jax.hf.safetensors_io import TensorEntry, read_tensor
from phi3_jax.model.layers import FusedLinear, SplitWeight
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.quant import Quantized

ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of memory that it takes over without a copy

# (path in the model's state, shape) -> how an array of that leaf lies. A leaf may have several: those
# of a quantised weight, or the parts of a fused one.
Shardings = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


def read_whole(
    pool: ThreadPoolExecutor, slots: Sequence[Slot], tensors: Mapping[str, TensorEntry], dtype: np.dtype
) -> Shaped[np.ndarray, "*shape"]:
    """The leaf on the host: the layers' tensors stacked, or the one that there is."""
    shape = slots[0].shape if slots[0].layer is None else (len(slots), *slots[0].shape)
    return _read(pool, slots, tensors, dtype, tuple((0, size) for size in shape))


def read_sharded(
    pool: ThreadPoolExecutor,
    slots: Sequence[Slot],
    tensors: Mapping[str, TensorEntry],
    dtype: np.dtype,
    sharding: Callable[[tuple[int, ...]], Sharding],
    rows: slice = slice(None),
) -> Shaped[Array, "*shape"]:
    """The leaf as devices share it. Each host reads what its devices hold, once, and nothing else.

    Host memory holds one device's share at a time.

    **Arguments**: `sharding`, for a shape; `rows`, of each layer's tensor, where not all are wanted.
    """
    first, last, _ = rows.indices(slots[0].shape[0])
    shape: tuple[int, ...] = (last - first, *slots[0].shape[1:])
    if slots[0].layer is not None:
        shape = len(slots), *shape
    where = sharding(shape)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        host = _read(pool, slots, tensors, dtype, bounds, first)
        shards += [jax.device_put(host, device) for device in devices]
        # Waiting frees the host's copy before the next one is made.
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def read_parts(
    pool: ThreadPoolExecutor,
    slots: Sequence[Slot],
    tensors: Mapping[str, TensorEntry],
    dtype: np.dtype,
    sharding: Callable[[tuple[int, ...]], Sharding],
    parts: Iterable[slice],
) -> SplitWeight:
    """A fused weight in its parts, rows of it, each shared by itself; see `read_sharded`."""
    return SplitWeight(tuple(read_sharded(pool, slots, tensors, dtype, sharding, rows) for rows in parts))


def fused_rows(model: Phi3ForCausalLM, path: tuple[str, ...]) -> list[slice] | None:
    """The rows of each part of the weight at `path`, None where it is not a fused one."""
    module = functools.reduce(getattr, path[:-1], model)
    return list(module.rows.values()) if isinstance(module, FusedLinear) else None


def share(value: Quantized, sharding: Callable[[tuple[int, ...]], Sharding]) -> Quantized:
    """A quantised weight of numpy arrays, which every host has whole, as devices share each of its arrays."""

    def put(array: np.ndarray) -> Array:
        return jax.make_array_from_callback(array.shape, sharding(array.shape), lambda index: array[index])

    return jax.tree.map(put, value)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that the CPU backend can take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _read(
    pool: ThreadPoolExecutor,
    slots: Sequence[Slot],
    tensors: Mapping[str, TensorEntry],
    dtype: np.dtype,
    bounds: Sequence[tuple[int, int]],
    first_row: int = 0,
) -> np.ndarray:
    """What of the leaf is within `bounds`, for each axis; its rows are counted from `first_row` of a tensor."""
    array: Any = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    layers: Sequence[np.ndarray] = [array]
    if slots[0].layer is not None:
        (start, stop), *bounds = bounds
        slots, layers = slots[start:stop], array
    (start, stop), *others = bounds
    index = (slice(first_row + start, first_row + stop), *(slice(*ends) for ends in others))
    jobs = [
        pool.submit(read_tensor, tensors[slot.name], layer, index) for slot, layer in zip(slots, layers, strict=True)
    ]
    for job in jobs:
        job.result()
    return array
