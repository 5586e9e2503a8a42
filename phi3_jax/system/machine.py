"""Accelerators that a machine has, whether or not JAX can use them, and what is missing where it cannot.

Nothing here imports JAX: a process that computes asks once JAX has chosen.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# The first driver that CUDA 13 runs with; older ones take CUDA 12.
CUDA_13_DRIVER = 580
_GOOGLE = "0x1ae0"  # its number among the makers of PCI devices
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")


@dataclass(frozen=True)
class Machine:
    """What a machine has beside its CPU.

    Attributes:
        has_nvidia: An NVIDIA card.
        driver: The first part of its driver's version; None where it is not known.
        has_tpu: A TPU.
    """

    has_nvidia: bool = False
    driver: int | None = None
    has_tpu: bool = False


def look_at_machine(root: str | Path = "/", environment: Mapping[str, str] | None = None) -> Machine:
    """Looks for NVIDIA cards and TPUs where their drivers show them.

    Args:
        root: The folder in which /proc, /dev and /sys are.
        environment: Its variables; those of this process by default.

    Example:
        >>> look_at_machine("/nowhere", {})
        Machine(has_nvidia=False, driver=None, has_tpu=False)
    """
    root = Path(root)
    environment = os.environ if environment is None else environment
    version = _text(root / "proc/driver/nvidia/version")
    found = re.search(r"\b(\d{3})\.\d", version)
    has_nvidia = (
        bool(version)
        or _any(root / "proc/driver/nvidia/gpus", "*")
        or _any(root / "dev", "nvidia[0-9]*")
        or (root / "usr/lib/wsl/lib/libcuda.so.1").exists()  # under Windows
        or shutil.which("nvidia-smi", path=environment.get("PATH", "")) is not None
    )
    return Machine(has_nvidia, int(found[1]) if found else None, _has_tpu(root, environment))


def what_is_missing(
    machine: Machine,
    environment: Mapping[str, str] | None = None,
    *,
    has_module: Callable[[str], bool] = lambda name: find_spec(name) is not None,
    reason: Callable[[str], str | None] = lambda platform: None,
) -> str:
    """What is to be said where JAX computes on a CPU.

    Args:
        machine: What there is.
        environment: Its variables; those of this process by default.
        has_module: Whether a module is installed.
        reason: Why JAX has not started a platform (`tpu`, `cuda`) for which it has a plug-in.

    Example:
        >>> what_is_missing(Machine(), {})
        'no TPU or GPU was found'
        >>> what_is_missing(Machine(has_nvidia=True), {}, has_module=lambda name: False)
        "no TPU or GPU was found; JAX saw an NVIDIA card and has no plug-in for it: pip install 'phi3_jax[cuda13]'"
    """
    environment = os.environ if environment is None else environment
    nothing = "no TPU or GPU was found"
    if machine.has_tpu:
        name, platform, extra, is_there = "a TPU", "tpu", "tpu", has_module("libtpu")
    elif machine.has_nvidia:
        extra = "cuda12" if machine.driver is not None and machine.driver < CUDA_13_DRIVER else "cuda13"
        is_there = any(has_module(f"jax_cuda{release}_plugin") for release in (12, 13))
        name, platform = "an NVIDIA card", "cuda"
    else:
        return nothing
    if not is_there:
        return f"{nothing}; JAX saw {name} and has no plug-in for it: pip install 'phi3_jax[{extra}]'"
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {platform, "gpu" if platform == "cuda" else platform} & set(platforms.split(",")):
        return f"{name} is there, and JAX_PLATFORMS={platforms} keeps JAX from it"
    why = reason(platform)
    return f"{nothing}; {name} is there, and JAX could not start its plug-in for it" + (f" ({why})" if why else "")


def _has_tpu(root: Path, environment: Mapping[str, str]) -> bool:
    if any(environment.get(name) for name in _TPU_VARIABLES) or _any(root / "dev", "accel[0-9]*"):
        return True
    # Other devices are handed to guests by vfio, too.
    makers = (_text(file).strip() for file in (root / "sys/bus/pci/devices").glob("*/vendor"))
    return (root / "dev/vfio").exists() and _GOOGLE in makers


def _any(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
