"""The devices that a run is planned for, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_jax.parallel.hardware import HARDWARE, GiB
from phi3_jax.system.errors import InputError
from phi3_jax.system.memory import total_memory

if TYPE_CHECKING:
    from jax import Device


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
    """

    name: str
    platform: str
    device_kind: str
    devices: int
    hbm: int
    bounds: tuple[int, ...] = ()


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
    "l40s": "NVIDIA L40S",
    "l40": "NVIDIA L40",
    "l4": "NVIDIA L4",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx3090": "NVIDIA GeForce RTX 3090",
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


def parse_topology(name: str) -> Topology:
    """The topology of that name: `cpu`, `gpu:h100`, `gpu:h100:8` (or `gpu:h100x8`), `v5e:2x2`, `v5p:2x2x4`.

    Raises:
        InputError: For what is none, with a list of those that there are.
    """
    text = name.strip().lower()
    if text == "cpu":
        return _cpu(name)
    if gpu := re.fullmatch(r"gpu:([a-z0-9-]+?)(?:[:x]([1-9]\d*))?", text):
        if gpu[1] in GPUS:
            kind = GPUS[gpu[1]]
            return Topology(name, "gpu", kind, int(gpu[2] or 1), HARDWARE[kind].memory)
    elif (tpu := re.fullmatch(r"(v\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", text)) and tpu[1] in TPUS:
        kind, limit = TPUS[tpu[1]]
        bounds = tuple(int(size) for size in tpu[2].split("x"))
        _check_bounds(name, tpu[1], bounds)
        return Topology(name, "tpu", kind, math.prod(bounds), int(limit), bounds)
    raise InputError(
        f"topology {name!r} is not known; give cpu, gpu:KIND or gpu:KIND:NUMBER with KIND one of {', '.join(GPUS)}, "
        f"or a TPU slice such as v5e:1x1, v5e:2x2, v6e:4x4, v5p:2x2x4 ({', '.join(TPUS)})"
    )


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
        kind = next(name for name, kind in GPUS.items() if kind == topology.device_kind)
        return [(f"gpu:{kind}:{number}", number) for number in (2, 4, 8) if number > topology.devices]
    if topology.platform == "cpu":
        return []
    tpu = _tpu(topology)
    shapes = ["2x2x1", "2x2x2", "2x2x4", "4x4x4"] if tpu in THREE_DIMENSIONS else ["2x2", "2x4", "4x4", "4x8", "8x8"]
    found = [(f"{tpu}:{shape}", math.prod(map(int, shape.split("x")))) for shape in shapes]
    return [(name, number) for name, number in found if number > topology.devices]


def tpu_devices(topology: Topology) -> Sequence[Device]:
    """The devices of a TPU slice that is not here, for libtpu to compile for. Needs libtpu."""
    from jax.experimental import topologies

    bounds = (*topology.bounds, 1)[:3]
    options: dict[str, str | tuple[int, ...]] = {}
    if topology.devices == 1:
        options["chips_per_host_bounds"] = bounds
    tpu = _tpu(topology)
    if tpu in THREE_DIMENSIONS:  # whose two cores are one device
        options["chip_config_name"] = "megacore"
    layout = f"{tpu}:{'x'.join(map(str, bounds))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices


def _tpu(topology: Topology) -> str:
    return next(name for name, (kind, _) in TPUS.items() if kind == topology.device_kind)


def _cpu(name: str) -> Topology:
    import jax

    devices = jax.local_device_count("cpu")
    return Topology(name, "cpu", "cpu", devices, total_memory() // devices)
