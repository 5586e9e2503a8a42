"""The mesh of devices, and the one that a program is being traced for."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from phi3_jax.parallel.hardware import hardware
from phi3_jax.system.errors import InputError
from phi3_jax.system.machine import look_at_machine, what_is_missing
from phi3_jax.system.memory import total_memory
from phi3_jax.system.text import first_line

# data: copies of the model, each with its own rows; fsdp: devices that share one copy's weights;
# tensor: devices that share each matrix product; context: devices that share each row's positions.
AXES = ("data", "fsdp", "tensor", "context")

# What a program for a single device is traced for.
ALONE = AbstractMesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES))


AnyMesh = Mesh | AbstractMesh


def mesh_shape(parallel: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every axis, -1 made the number of devices that the others leave.

    Raises:
        InputError: where the axes and the number of devices do not go together.
    """
    shape = {axis: parallel.get(axis, 1) for axis in AXES}
    given = ", ".join(f"{axis} {size}" for axis, size in shape.items())
    known = math.prod(size for size in shape.values() if size != -1)
    if devices % known:
        raise InputError(
            f"parallel: {given} multiply to {known}, which does not divide the {devices} devices there are; "
            "give axes whose product does"
        )
    return {axis: devices // known if size == -1 else size for axis, size in shape.items()}


def make_mesh(parallel: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with the axes `AXES`, for use with `jax.set_mesh`.

    Axes are of type Auto: the compiler spreads what the rules of `sharding` leave open.

    Args:
        parallel: the sizes of axes, 1 where there is none; one of them may be -1 for "all that are left".
        devices: all of JAX's by default.

    Raises:
        InputError: where the product does not divide the number of devices, and where it leaves devices out on
            several hosts, each of which must take part; where slices or their wiring forbid the axes.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(parallel, len(devices))
    used = math.prod(shape.values())
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise InputError(
            f"parallel: the axes take {used} of the {len(devices)} devices; on several hosts they must take all: "
            "set one axis to -1"
        )
    slices = slices_of(devices)
    check_slices(shape, slices)
    sizes, types = tuple(shape.values()), (AxisType.Auto,) * len(AXES)
    if used == len(devices) and used > 1:
        return Mesh(_as_wired(sizes, devices, slices), AXES, axis_types=types)
    return Mesh(np.array(devices[:used]).reshape(sizes), AXES, axis_types=types)


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices belong to; within one they are wired to each other. Others are one.

    Example:
        >>> slices_of(jax.devices("cpu"))
        1
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_slices(shape: Mapping[str, int], slices: int) -> None:
    """Raises `InputError` where a mesh would have another axis than `data` between slices, which a network connects.

    Args:
        shape: The size of every axis.
        slices: How many there are.

    Example:
        >>> check_slices({"data": 4, "fsdp": 8}, slices=2)
    """
    if shape["data"] % slices:
        raise InputError(
            f"parallel.data is {shape['data']}, and there are {slices} slices, between which only copies of the model "
            f"may lie; give parallel.data {slices}, or a multiple of it"
        )


def _as_wired(sizes: tuple[int, ...], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
    """The devices in the order in which neighbours along an axis are neighbours; between slices lies the first axis."""
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        within, between = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError) as error:
        said = first_line(error)
        axes = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        where = f"{slices} slices of " if slices > 1 else ""
        raise InputError(
            f"parallel: {axes} cannot be laid out on {where}{len(devices) // slices} x {devices[0].device_kind}"
            f"{f': {said}' if said else ''}; give axes that divide the sides of a slice"
        ) from error


def pass_rows(per_device: int, shape: Mapping[str, int]) -> int:
    """Rows of a forward pass over all devices; those of `tensor` and `context` share theirs."""
    return per_device * shape["data"] * shape["fsdp"]


def describe_mesh(mesh: Mesh) -> str:
    """A line that says what a run uses, and what it leaves idle."""
    there = jax.device_count()
    kind = jax.devices()[0].device_kind
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    devices = f"devices ({axes})" if axes else "device"
    idle = f"; {there - mesh.size} more are idle: parallel.fsdp -1 takes them all" if mesh.size < there else ""
    return f"on {mesh.size} {kind} {devices}{idle}"


def device_line() -> str:
    """What is computed on, in a line; on a CPU with what is missing where the machine has more."""
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    found = f"device: {kind}" if count == 1 else f"devices: {count} x {kind}"
    if devices[0].platform != "cpu":
        return found
    return f"{found}; {what_is_missing(look_at_machine(), reason=_why_not)}"


def _why_not(platform: str) -> str | None:
    """JAX's own word on a platform that it has not started."""
    try:
        jax.devices(platform)
    except RuntimeError as error:
        return first_line(error).partition(": ")[2]
    return None


def ambient_mesh() -> AbstractMesh:
    """The mesh of `jax.set_mesh`; where none is set, or one of a single device, `ALONE`."""
    mesh = jax.sharding.get_abstract_mesh()
    return ALONE if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the program being traced is for, which on a machine that only plans
    a run is not what it has."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """JAX's `device_kind` of the devices that the program being traced is for."""
    planned = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return str((jax.devices()[0] if planned is None else planned).device_kind)


def is_before_ampere() -> bool:
    """Whether the program being traced is for an NVIDIA GPU older than Ampere, which has no bfloat16."""
    kind, here = device_kind(), jax.devices()[0]
    if (peaks := hardware(kind)) is not None:
        return peaks.float32 is not None
    return kind == here.device_kind and float(getattr(here, "compute_capability", "inf")) < 8


def auto_dtype(dtype: str) -> str:
    """What `auto` stands for: bfloat16, and on a CPU float32. Other types stay as they are."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def devices_memory() -> int:
    """Bytes that arrays may take on the devices in use: of `jax.set_mesh`'s mesh all, else of one."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:  # a CPU's devices share the main memory
        return total_memory()
    return int(stats["bytes_limit"] * ambient_mesh().size)
