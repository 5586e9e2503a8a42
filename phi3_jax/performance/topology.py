"""The devices that a run is planned for, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phi3_jax.parallel.hardware import GB, HARDWARE, GiB
from phi3_jax.parallel.mesh import slices_of
from phi3_jax.performance.gpu_targets import target_config
from phi3_jax.system.errors import InputError
from phi3_jax.system.memory import total_memory

if TYPE_CHECKING:
    from jax import Device
    from jax.sharding import AbstractMesh

    from phi3_jax.config.run import RunConfig


@dataclass(frozen=True)
class Topology:
    """Devices of one kind, which need not be here.

    Attributes:
        name: As given.
        platform: `cpu`, `gpu` or `tpu`.
        device_kind: JAX's name for one device.
        devices: How many.
        hbm: Bytes of memory that each has.
        bounds: Of a TPU slice: chips along each axis.
        slices: How many of such slices, between which a network lies.
    """

    name: str
    platform: str
    device_kind: str
    devices: int
    hbm: int
    bounds: tuple[int, ...] = ()
    slices: int = 1


# JAX's device_kind of each.
GPUS = {
    "b200": "NVIDIA B200",
    "h200": "NVIDIA H200",
    "h200-nvl": "NVIDIA H200 NVL",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-nvl": "NVIDIA H100 NVL",
    "h100-pcie": "NVIDIA H100 PCIe",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a10g": "NVIDIA A10G",
    "a10": "NVIDIA A10",
    "l40s": "NVIDIA L40S",
    "l40": "NVIDIA L40",
    "l4": "NVIDIA L4",
    "t4": "Tesla T4",
    "v100": "Tesla V100-SXM2-16GB",
    "v100-32gb": "Tesla V100-SXM2-32GB",
    "rtx5090": "NVIDIA GeForce RTX 5090",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx6000-ada": "NVIDIA RTX 6000 Ada Generation",
    "a6000": "NVIDIA RTX A6000",
}
# What else people call them.
OTHER_NAMES = {
    **{kind.removeprefix("rtx"): kind for kind in GPUS if kind.startswith("rtx") and kind[3:].isdecimal()},
    **{f"rtx-{kind[3:]}": kind for kind in GPUS if kind.startswith("rtx")},
    "a100-80gb": "a100",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "v100-16gb": "v100",
    "rtx-a6000": "a6000",
    "rtxa6000": "a6000",
}
# JAX's device_kind, and the bytes that XLA lets a program use, less than the device has.
TPUS = {
    "v5e": ("TPU v5 lite", 15.75 * GiB),
    "v6e": ("TPU v6 lite", 31.25 * GiB),
    "v5p": ("TPU v5", 95.74 * GiB),
    "v4": ("TPU v4", 30.75 * GiB),
}
# Chips of these are wired in three dimensions, the others' in two.
THREE_DIMENSIONS = ("v4", "v5p")
# What Google calls slices: a name and a number, of chips or, where a chip has two, of cores.
GOOGLE_NAMES = {"v5litepod": "v5e", "v5e": "v5e", "v6e": "v6e", "v5p": "v5p", "v4": "v4"}
# Cloud TPU documentation, the tables of slices of each version: their shapes, by number of chips.
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES_3D = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16"),
    *("16x16x16", "16x16x24"),
)
HERE = "here"
_SLICES = r"(?::([1-9]\d{0,3}))?"  # how many of them
CARDS_OF_A_HOST = 8
# What JAX takes of a GPU's memory unless told otherwise.
JAX_GPU_SHARE = 0.75


def parse_topology(name: str) -> Topology:
    """The topology of that name.

    `cpu`; `here`, the devices of this machine; `gpu:h100`, `gpu:h100:8` (or `gpu:h100x8`); `gpu:24GB`, of which
    nothing but the memory is known; TPU slices by their shape, `v5e:2x2`, `v5p:2x2x4`, or by Google's names,
    `v5litepod-8`, `v6e-8`, `v5p-8`; several slices with their number behind it, `v5e:4x4:2`, `v6e-64:2`.

    Raises:
        InputError: For what is none, with a list of those that there are.
    """
    text = name.strip().lower()
    if text == "cpu":
        return _cpu(name)
    if text == HERE:
        return _here()
    for gpu, number in _gpus(text):
        if gpu in GPUS:
            kind = GPUS[gpu]
            return Topology(name, "gpu", kind, number, HARDWARE[kind].memory)
        if memory := re.fullmatch(r"([1-9]\d{0,3})(gi?b)", gpu):
            unit, size = {"gb": (GB, "GB"), "gib": (GiB, "GiB")}[memory[2]], int(memory[1])
            return Topology(name, "gpu", f"GPU of {size} {unit[1]}", number, size * unit[0])
    if (tpu := re.fullmatch(rf"(v\w+):([1-9]\d*(?:x[1-9]\d*){{1,2}}){_SLICES}", text)) and tpu[1] in TPUS:
        return _tpu_slices(name, tpu[1], tpu[2], int(tpu[3] or 1))
    if (tpu := re.fullmatch(rf"(v\w+)-(\d+){_SLICES}", text)) and tpu[1] in GOOGLE_NAMES:
        return _google_slices(name, tpu[1], int(tpu[2]), int(tpu[3] or 1))
    raise InputError(
        f"topology {name!r} is not known; give cpu, here, gpu:KIND or gpu:KIND:NUMBER with KIND one of "
        f"{', '.join(GPUS)} or a memory such as 24GB, or a TPU slice, by shape such as v5e:2x2 or v5p:2x2x4 "
        f"({', '.join(TPUS)}) or by Google's name such as v5litepod-8, v6e-8 or v5p-8; several slices "
        "with their number behind it, such as v5e:4x4:2"
    )


def _gpus(text: str) -> Iterator[tuple[str, int]]:
    """What may be meant of GPUs, under our names: a kind, with `gpu:` before it or without, and how many."""
    text = text.removeprefix("gpu:")
    parts = re.fullmatch(r"(.+)[:x]([1-9]\d*)", text)  # the x of rtx4090 is none
    for kind, number in ((text, 1), *([(parts[1], int(parts[2]))] if parts else [])):
        kind = kind.removeprefix("nvidia-").replace("_", "-")
        yield OTHER_NAMES.get(kind, kind), number


def _tpu_slices(name: str, tpu: str, shape: str, slices: int = 1) -> Topology:
    kind, limit = TPUS[tpu]
    bounds = tuple(int(size) for size in shape.split("x"))
    _check_bounds(name, tpu, bounds)
    return Topology(name, "tpu", kind, slices * math.prod(bounds), int(limit), bounds, slices)


def _google_slices(name: str, google: str, number: int, slices: int) -> Topology:
    """The slices that Google rents under that name."""
    tpu = GOOGLE_NAMES[google]
    shapes = _slices(tpu)
    if number not in shapes:
        what = "numbers are of cores, two a chip" if tpu in THREE_DIMENSIONS else "numbers are of chips"
        sizes = ", ".join(f"{google}-{size}" for size in shapes)
        raise InputError(f"topology {name!r}: there is no such slice; {what}: {sizes}; or give a shape: {tpu}:AxB")
    return _tpu_slices(name, tpu, shapes[number], slices)


def _slices(tpu: str) -> dict[int, str]:
    """Shapes by the number in Google's name."""
    shapes, units = (_SHAPES_3D, 2) if tpu in THREE_DIMENSIONS else (_SHAPES_2D, 1)
    return {units * math.prod(map(int, shape.split("x"))): shape for shape in shapes}


def _check_bounds(name: str, tpu: str, bounds: tuple[int, ...]) -> None:
    if len(bounds) == 3 and tpu not in THREE_DIMENSIONS and bounds[2] != 1:
        raise InputError(f"topology {name!r}: chips of {tpu} are wired in two dimensions; give one such as {tpu}:4x4")
    if bounds[0] * bounds[1] > 1 and any(size % 2 for size in bounds[:2]):
        raise InputError(
            f"topology {name!r}: hosts have 2x2 chips, so that slices have an even number along each of the first two "
            f"axes, or are a single chip; give one such as {tpu}:2x2"
        )


def larger(topology: Topology) -> list[tuple[str, int]]:
    """(name, devices) of some with more devices of the same kind; none for a CPU."""
    if topology.platform == "gpu":
        kind = next((name for name, kind in GPUS.items() if kind == topology.device_kind), None)
        if kind is None:  # by its memory alone
            gigabytes, rest = divmod(topology.hbm, GB)
            kind = f"{topology.hbm // GiB}GiB" if rest else f"{gigabytes}GB"
        return [(f"gpu:{kind}:{number}", number) for number in (2, 4, 8) if number > topology.devices]
    if topology.platform == "cpu":
        return []
    tpu = _tpu(topology)
    shapes = ["2x2x1", "2x2x2", "2x2x4", "4x4x4"] if tpu in THREE_DIMENSIONS else ["2x2", "2x4", "4x4", "4x8", "8x8"]
    found = [(f"{tpu}:{shape}", math.prod(map(int, shape.split("x")))) for shape in shapes]
    return [(name, number) for name, number in found if number > topology.devices]


def tpu_devices(topology: Topology) -> Sequence[Device]:
    """The devices of TPU slices that are not here, for libtpu to compile for. Needs libtpu."""
    from jax.experimental import topologies

    bounds = (*topology.bounds, 1)[:3]
    options: dict[str, str | int | tuple[int, ...]] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(bounds) == 1:
        options["chips_per_host_bounds"] = bounds
    tpu = _tpu(topology)
    if tpu in THREE_DIMENSIONS:  # whose two cores are one device
        options["chip_config_name"] = "megacore"
    layout = f"{tpu}:{'x'.join(map(str, bounds))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices


def gpu_devices(topology: Topology) -> Sequence[Device]:
    """The cards of a topology, which need not be here, for XLA to compile for. Needs JAX's plug-in for NVIDIA's.

    They are taken to be in one machine, or in machines of `CARDS_OF_A_HOST` where there are more.
    """
    from jax.experimental import topologies

    hosts = 1 if topology.devices % CARDS_OF_A_HOST else topology.devices // CARDS_OF_A_HOST
    layout = f"1x{hosts}x{topology.devices // hosts}"
    target = target_config(topology.device_kind)
    assert target is not None, topology.device_kind
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=layout).devices


def _tpu(topology: Topology) -> str:
    return next(name for name, (kind, _) in TPUS.items() if kind == topology.device_kind)


def _cpu(name: str) -> Topology:
    import jax

    devices = jax.local_device_count("cpu")
    return Topology(name, "cpu", "cpu", devices, total_memory() // devices)


def topology_of(devices: Sequence[Device]) -> Topology:
    """That of devices that are there, with the memory that JAX lets arrays take now, and without a shape of slices."""
    first = devices[0]
    if first.platform == "cpu":
        return replace(_cpu(HERE), devices=len(devices))
    limit = int((first.memory_stats() or {}).get("bytes_limit", 0))
    if first.platform == "tpu":
        known = next((int(hbm) for kind, hbm in TPUS.values() if kind == first.device_kind), 0)
        return Topology(HERE, "tpu", first.device_kind, len(devices), limit or known, slices=slices_of(devices))
    return Topology(HERE, "gpu", first.device_kind, len(devices), int(limit / JAX_GPU_SHARE) or _data_sheet(first))


def _data_sheet(device: Device) -> int:
    known = HARDWARE.get(device.device_kind)
    return known.memory if known else 0


def _here() -> Topology:
    """The devices of this machine, as JAX sees them."""
    import jax

    devices = jax.local_devices()
    first = devices[0]
    if first.platform == "cpu":
        return _cpu(HERE)
    if first.platform == "gpu":
        # What JAX lets arrays take is less than there is, and unlike it from run to run.
        there = topology_of(devices)
        name = next((name for name, kind in GPUS.items() if kind == first.device_kind), None)
        name = HERE if name is None else f"gpu:{name}:{len(devices)}"
        return replace(there, name=name, hbm=_data_sheet(first) or there.hbm)
    tpu = next((name for name, (kind, _) in TPUS.items() if kind == first.device_kind), None)
    shape = _slices(tpu).get(len(devices) * (2 if tpu in THREE_DIMENSIONS else 1)) if tpu else None
    if tpu is None or shape is None:
        raise InputError(
            f"plan knows no figures for {len(devices)} x {first.device_kind}; give a topology such as v5e:2x4"
        )
    return _tpu_slices(f"{tpu}:{shape}", tpu, shape)


def abstract_mesh(run: RunConfig, topology: Topology) -> AbstractMesh:
    """The mesh that `run.parallel` asks for, of no devices at all, but known to be for the topology's.

    Raises:
        InputError: Where it does not divide their number, and where slices forbid it.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from phi3_jax.parallel.mesh import AXES, check_slices, mesh_shape

    shape = mesh_shape(run.parallel.sizes, topology.devices)
    check_slices(shape, topology.slices)
    device = AbstractDevice(topology.device_kind, None, topology.platform)
    return AbstractMesh(tuple(shape.values()), AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)
