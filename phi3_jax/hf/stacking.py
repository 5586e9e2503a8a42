"""Layers' tensors stacked on the devices, each sent there while the next ones are read.

A stack is made where it is to lie, and every layer is written into its place as it comes: the host holds a few
layers and not the stack, and reading, quantising and sending go on at once. Where hosts hold the same, as along the
axis `data`, each reads a share of the layers, and the devices send them on.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Shaped

from phi3_jax.parallel.distributed import together
from phi3_jax.system.errors import InputError

AXIS = "data"
READ_AHEAD = 8  # groups of layers that are read beforehand, by as many threads
SENT = 2  # groups that are on their way to the devices

Index = tuple[slice, ...]
# (layer, the parts of each of its arrays) -> these parts; of an array that the devices hold whole there is one part.
Cut = Callable[[int, "Places"], list[list[np.ndarray]]]


def is_by_layers(where: Sharding | None) -> bool:
    """Whether a stack is made on its devices: not on CPUs, which take over the host's memory without a copy, unless
    hosts share the reading."""
    if where is None:
        return jax.default_backend() != "cpu"
    if isinstance(where, NamedSharding) and len(where.spec) and where.spec[0] is not None:
        return False  # the layers themselves are shared out
    device: jax.Device = next(iter(where.device_set))
    return bool(device.platform != "cpu") or shares(where) > 1


def shares(where: Sharding | None) -> int:
    """How many groups of hosts hold the same and can read a share each: the size of `data`, or 1."""
    if not isinstance(where, NamedSharding) or jax.process_count() == 1 or where.mesh.shape.get(AXIS, 1) == 1:
        return 1
    if AXIS in jax.tree.leaves(tuple(where.spec)):
        return 1
    devices = np.moveaxis(where.mesh.devices, where.mesh.axis_names.index(AXIS), 0)
    holders = [{device.process_index for device in part.flat} for part in devices]
    return len(holders) if holders[0].isdisjoint(holders[1]) else 1


def divided(where: Sharding, shape: tuple[int, ...]) -> Sharding:
    """As it is, but the first axis of which `data` makes even shares cut by it too, where hosts share the reading."""
    count = shares(where)
    if count == 1 or not isinstance(where, NamedSharding):
        return where
    spec = [*where.spec, *[None] * (len(shape) - len(where.spec))]
    for axis, size in enumerate(shape):
        names = (*_names(spec[axis]), AXIS)
        parts = int(np.prod([where.mesh.shape[name] for name in names]))
        if size % parts == 0:
            return NamedSharding(where.mesh, PartitionSpec(*spec[:axis], names, *spec[axis + 1 :]))
    return where


def gathered(array: Array, where: Sharding) -> Array:
    """An array of `divided`, where it is to lie."""
    return array if array.sharding == where else _resharder(where)(array)


@dataclass(frozen=True)
class Places:
    """Where a group of layers lies: of each of its arrays the parts that this host's devices hold.

    Attributes:
        first: The layer of the group that is meant, from 0.
        parts: The devices by the part of a layer's array, for each array.
    """

    first: int
    parts: list[dict[tuple[tuple[int, int], ...], list[jax.Device]]]

    def indices(self, array: int) -> list[Index]:
        """Slices of a layer's array."""
        return [tuple(slice(*ends) for ends in bounds) for bounds in self.parts[array]]


class Stack:
    """The arrays of a leaf's layers on the devices.

    Args:
        number: How many layers.
        shapes: Of a layer's arrays.
        dtypes: Theirs.
        wheres: How each of the stacked arrays lies; None on the default device.
    """

    def __init__(
        self,
        number: int,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype],
        wheres: Sequence[Sharding | None],
    ) -> None:
        self._shapes, self._wheres = list(shapes), list(wheres)
        count = min((shares(where) for where in wheres), default=1)
        self.group = count if count <= number else 1
        # The last group may hold layers of the one before it again.
        self.starts = [min(start, number - self.group) for start in range(0, number, self.group)]
        whole = zip(shapes, dtypes, wheres, strict=True)
        self.arrays = [_zeros(where)((number, *shape), np.dtype(dtype)) for shape, dtype, where in whole]
        self._sent: deque[list[Array]] = deque()

    def places(self) -> list[Places]:
        """Which layers of a group this host reads, and the parts of each."""
        held: dict[int, Places] = {}
        for array, shape in enumerate(self._shapes):
            for device, index in self._indices(array, shape).items():
                (first, _), *bounds = (
                    cut.indices(size)[:2] for cut, size in zip(index, (self.group, *shape), strict=True)
                )
                found = held.setdefault(first, Places(first, [{} for _ in self._shapes]))
                found.parts[array].setdefault(tuple(bounds), []).append(device)
        return [held[first] for first in sorted(held)]

    def _indices(self, array: int, shape: tuple[int, ...]) -> dict[jax.Device, Index]:
        where = self._of_group(array)
        if where is None:
            return {jax.devices()[0]: (slice(None),) * (1 + len(shape))}
        found = where.addressable_devices_indices_map((self.group, *shape))
        return {device: index for device, index in found.items() if index is not None}

    def _of_group(self, array: int) -> Sharding | None:
        where = self._wheres[array]
        if self.group == 1 or not isinstance(where, NamedSharding):
            return where
        return NamedSharding(where.mesh, PartitionSpec(AXIS, *where.spec[1:]))

    def write(self, start: int, layers: Sequence[tuple[Places, list[list[np.ndarray]]]]) -> None:
        """Sends a group of layers on its way, once few enough others are."""
        if len(self._sent) == SENT:
            jax.block_until_ready(self._sent.popleft())
        pieces = []
        for array, shape in enumerate(self._shapes):
            where = self._of_group(array)
            if where is None:
                ((_, parts),) = layers
                piece = jax.device_put(parts[array][0][None])
            else:
                shards = [
                    jax.device_put(part[None], device)
                    for places, parts in layers
                    for part, devices in zip(parts[array], places.parts[array].values(), strict=True)
                    for device in devices
                ]
                piece = jax.make_array_from_single_device_arrays((self.group, *shape), where, shards)
            self.arrays[array] = _writer(self._wheres[array])(self.arrays[array], piece, np.int32(start))
            pieces.append(piece)
        self._sent.append(pieces)

    def blank(self, places: Places) -> list[list[np.ndarray]]:
        """What stands in for a layer that could not be read."""
        return [
            [np.zeros(_size(index), array.dtype) for index in places.indices(number)]
            for number, array in enumerate(self.arrays)
        ]


def fill(stack: Stack, cut: Cut, pool: ThreadPoolExecutor) -> list[Array]:
    """Has all layers read and written into their places; all processes take part.

    Args:
        stack: Where they go.
        cut: Reads the parts of a layer. It is called in several threads.
        pool: These.

    Raises:
        InputError: In all processes, where `cut` does so in one.
    """
    fault: list[InputError] = []
    places = stack.places()
    for start, layers in _ahead(stack.starts, places, cut, pool):
        parts = []
        for each, coming in zip(places, layers, strict=True):
            try:
                parts.append((each, coming.result()))
            except InputError as error:
                if stack.group == 1:
                    raise
                # Other hosts wait for this one's layers: they get some, and are told when all are through.
                fault.append(error)
                parts.append((each, stack.blank(each)))
        stack.write(start, parts)
    if stack.group > 1:
        with together():
            if fault:
                raise fault[0]
    return stack.arrays


def _ahead(
    starts: Sequence[int], places: Sequence[Places], cut: Cut, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[Future[list[list[np.ndarray]]]]]]:
    coming: deque[tuple[int, list[Future[list[list[np.ndarray]]]]]] = deque()
    try:
        for start in starts:
            coming.append((start, [pool.submit(cut, start + each.first, each) for each in places]))
            if len(coming) == READ_AHEAD:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
    finally:
        for _, jobs in coming:
            for job in jobs:
                job.cancel()


def _size(index: Index) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in index)


def _names(entry: object) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)  # type: ignore[arg-type]


@cache
def _zeros(where: Sharding | None) -> Callable[[tuple[int, ...], np.dtype], Array]:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)


@cache
def _writer(where: Sharding | None) -> Callable[[Array, Array, np.int32], Array]:
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(write, donate_argnums=0, out_shardings=where)


@cache
def _resharder(where: Sharding) -> Callable[[Shaped[Array, "*shape"]], Shaped[Array, "*shape"]]:
    return jax.jit(lambda array: array, out_shardings=where)
