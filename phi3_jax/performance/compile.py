"""A step compiled for devices that need not be here: its memory, and what its devices send one another.

Run as a program (`python -m phi3_jax.performance.compile`), since libtpu writes to standard error, and a compiler
may take its process with it: a request as JSON on standard input, the answer as JSON on standard output.
"""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.hardware import HARDWARE
from phi3_jax.performance.cost import StepCost, step_cost
from phi3_jax.performance.gpu_targets import target_config
from phi3_jax.performance.hlo import Program
from phi3_jax.performance.topology import HERE, Topology, gpu_devices, parse_topology, tpu_devices
from phi3_jax.system.compat_xla import bytes_needed
from phi3_jax.system.errors import InputError
from phi3_jax.system.packages import package_versions

GET_LIBTPU = "pip install 'phi3_jax[tpu]'"
GET_PLUGIN = "pip install 'phi3_jax[plan-gpu]'"


@dataclass(frozen=True)
class Compiled:
    """What a compiler said of a step.

    Attributes:
        bytes_per_device: That the program takes.
        host_bytes_per_device: Of the host's memory.
        fits: Whether the compiler placed it.
        seconds: To compile.
        collectives: In a layer of the forward and of the backward pass, each with how often; empty where it does not
            fit.
        cost: Of one step by kind of work; None where it does not fit, and where the compiler gives no estimates.
        notices: Lines that the user should see, of options that the compiler does not know.
    """

    bytes_per_device: int
    host_bytes_per_device: int
    fits: bool
    seconds: float
    collectives: dict[str, dict[str, int]]
    cost: StepCost | None = None
    notices: list[str] = field(default_factory=list)


class MemoryStats(Protocol):
    """What XLA says of a program's memory, each also as `host_…`; the two that are named here of the device alone."""

    @property
    def peak_memory_in_bytes(self) -> int: ...

    @property
    def generated_code_size_in_bytes(self) -> int: ...


def has_libtpu() -> bool:
    """Whether libtpu, which compiles for TPUs, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_cuda_plugin() -> bool:
    """Whether JAX's plug-in for NVIDIA's cards, which compiles for them, is installed.

    Raises:
        InputError: One is, and JAX does not load it, since its version is another.
    """
    for release in (12, 13):
        name = f"jax-cuda{release}-plugin"
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            continue
        plugin, jaxlib = package_versions(name, "jaxlib").values()
        if _release(str(plugin)) != _release(str(jaxlib)):
            raise InputError(
                f"{name} is {plugin}, expected {jaxlib} as jaxlib is: JAX loads no other; pip install "
                f"'{name}=={jaxlib}' 'jax-cuda{release}-pjrt=={jaxlib}', or give --estimate"
            )
        return True
    return False


def _release(version: str) -> str:
    """The numbers of a version, without what may follow them."""
    return "".join(re.findall(r"^[\d.]*\d", version))


def why_not_compiled(topology: Topology) -> str | None:
    """What is missing to compile for a topology; None where nothing is.

    Raises:
        InputError: A compiler is installed in a version that JAX does not load.
    """
    if topology.platform == "tpu" and not has_libtpu():
        return f"libtpu, which compiles the step, is not here; {GET_LIBTPU}"
    if topology.platform != "gpu":
        return None
    if target_config(topology.device_kind) is None or topology.name == HERE:
        return f"XLA's compiler needs more of a {topology.device_kind} than is known"
    if not has_cuda_plugin():
        return f"JAX's plug-in for NVIDIA's cards, which compiles the step, is not here; {GET_PLUGIN}"
    return None


def compile_elsewhere(run: RunConfig, config: Phi3Config, topology: str, *, keep: Path | None = None) -> Compiled:
    """The step of such a run, compiled in a process of its own for the topology of that name.

    Args:
        run: All of it.
        config: The checkpoint's.
        topology: As `parse_topology` takes it.
        keep: A file for the text of the compiled program, compressed by gzip.

    Raises:
        InputError: For what is wrong with the run.
        RuntimeError: Where the compiler fails.
    """
    request = json.dumps(
        {"run": run.to_dict(), "config": config.to_dict(), "topology": topology, "keep": keep and str(keep)}
    )
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # What is here is not to be touched: another program may be at work on it. JAX compiles all the same for devices
    # that it is told of.
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=request, capture_output=True, text=True, env=environment, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.strip().splitlines() if "Error" in line] or ["no word of why"]
        raise RuntimeError(f"the compiler ended with status {done.returncode}: {said[-1].strip()[:300]}")
    answer = json.loads(lines[-1])
    if "input_error" in answer:
        raise InputError(answer["input_error"])
    cost = answer.pop("cost")
    return Compiled(**answer, cost=None if cost is None else StepCost.from_dict(cost))


def compile_here(run: RunConfig, config: Phi3Config, topology: str, *, keep: Path | None = None) -> Compiled:
    """The same in this process."""
    import jax

    from phi3_jax.parallel.mesh import make_mesh
    from phi3_jax.performance.collectives import count_collectives, layer_collectives
    from phi3_jax.training.abstract import abstract_step

    where = parse_topology(topology)
    devices = {"tpu": tpu_devices, "gpu": gpu_devices}.get(where.platform, lambda _: jax.devices("cpu"))(where)
    mesh = make_mesh(run.parallel.sizes, devices)
    step = abstract_step(run, config, mesh)
    start, notices = time.perf_counter(), list[str]()
    try:
        compiled = step.compile(notices.append)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(error)
        if needed is None:
            raise
        return Compiled(needed, 0, False, time.perf_counter() - start, {}, notices=notices)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if keep is not None:
        keep.write_bytes(gzip.compress(text.encode()))
    collectives = {name: count_collectives(found) for name, found in layer_collectives(text).items()}
    peaks = HARDWARE.get(where.device_kind)
    cost = step_cost(Program.of(text), peaks) if peaks is not None and peaks.clock is not None else None
    used = _used(compiled.memory_analysis(), where.platform)
    return Compiled(*used, True, seconds, collectives, cost, notices)


def _used(memory: MemoryStats, platform: str) -> tuple[int, int]:
    """Bytes of the device and of the host.

    On TPUs the most that is live at once, arguments included, and the program, which is what XLA holds against
    the limit; the sizes of temporaries that it reports there are larger than what it allocates. Elsewhere, and
    where something waits in the host's memory, of which that figure counts the most besides, arguments, results
    that are not written over them, and temporaries.
    """

    def total(prefix: str) -> int:
        sizes = {"argument": 1, "output": 1, "temp": 1, "alias": -1}
        return sum(sign * int(getattr(memory, f"{prefix}{name}_size_in_bytes")) for name, sign in sizes.items())

    on_host = total("host_")
    on_device = memory.peak_memory_in_bytes if platform == "tpu" and not on_host else total("")
    return on_device + memory.generated_code_size_in_bytes, on_host


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    answer: dict[str, object]
    try:
        run, config = RunConfig.from_dict(request["run"]), Phi3Config.from_dict(request["config"])
        keep = request["keep"]
        answer = asdict(compile_here(run, config, request["topology"], keep=None if keep is None else Path(keep)))
    except InputError as error:
        answer = {"input_error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
