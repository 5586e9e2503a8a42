"""`parallel: auto`: the axes of the mesh, chosen by what plan's estimate says of each device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import ParallelSection
from phi3_jax.parallel.hardware import GiB
from phi3_jax.performance.memory import ESTIMATE_MARGIN, Estimator
from phi3_jax.performance.topology import JAX_GPU_SHARE, Topology
from phi3_jax.system.errors import InputError
from phi3_jax.training.checks import check_mesh


@dataclass(frozen=True)
class Choice:
    """Axes, and why these.

    Attributes:
        parallel: The axes.
        needed: Bytes that the run takes on each device, by the estimate.
        why: In a line.
    """

    parallel: ParallelSection
    needed: int
    why: str


def choose_parallel(run: RunConfig, topology: Topology, estimator: Estimator) -> Choice:
    """The axes with which a run sends the least of those with which it fits.

    Copies (`data`) where a device holds the base and its rows; else the fewest devices that share a copy (`fsdp`);
    else devices that share rows too (`context`). Between slices there are always copies. Where nothing fits, the axes
    with which it takes the least.

    Args:
        run: Whose `parallel` does not matter.
        topology: The devices.
        estimator: Of the checkpoint's memory.

    Raises:
        InputError: No axes go with the run.
    """
    limit = topology.hbm * (JAX_GPU_SHARE if topology.platform == "gpu" else 1)
    tried: list[tuple[int, ParallelSection]] = []
    refusal: InputError | None = None
    for axes in _candidates(topology):
        try:
            check_mesh(run, estimator.config, axes.sizes)
            tried.append((estimator(replace(run, parallel=axes), topology).total, axes))
        except InputError as error:
            refusal = refusal or error
            continue
        if tried[-1][0] * (1 + ESTIMATE_MARGIN) <= limit:
            return Choice(axes, tried[-1][0], _why(axes, topology, tried, limit))
    if not tried:
        assert refusal is not None
        raise refusal
    needed, axes = min(tried, key=lambda pair: pair[0])
    least = f"with {_described(axes)} it takes the least, {_gib(needed)} of {_gib(limit)} GiB, which may not fit"
    return Choice(axes, needed, f"parallel: {least}; by plan's estimate")


def _candidates(topology: Topology) -> Iterator[ParallelSection]:
    """Axes that take all devices, those that send least first."""
    within = topology.devices // topology.slices
    for fsdp in _divisors(within):
        yield ParallelSection(data=topology.devices // fsdp, fsdp=fsdp)
    for context in _divisors(within)[1:]:
        yield ParallelSection(data=topology.slices, fsdp=within // context, context=context)


def _divisors(number: int) -> Sequence[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _why(axes: ParallelSection, topology: Topology, tried: Sequence[tuple[int, ParallelSection]], limit: float) -> str:
    taken = f"{_gib(tried[-1][0])} of {_gib(limit)} GiB"
    if topology.devices == 1:
        return f"parallel: there is one device, on which it takes {taken}, by plan's estimate"
    if axes.fsdp == axes.context == 1:
        why = f"each device holds the base and its rows in {taken}, so that only gradients of what trains are sent"
        return f"parallel: {_described(axes)}: {why}, by plan's estimate"
    before = tried[-2]
    of = f"{axes.fsdp * axes.context} devices share each copy, in {taken}"
    fewer = f"with {_described(before[1])} a device would need {_gib(before[0])} GiB"
    return f"parallel: {_described(axes)}: {of}; {fewer}, by plan's estimate"


def _described(axes: ParallelSection) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in axes.sizes.items() if size > 1) or "one device"


def _gib(size: float) -> str:
    return f"{size / GiB:.1f}"


def with_chosen_axes(run: RunConfig, topology: Topology, estimator: Estimator) -> tuple[RunConfig, list[str]]:
    """The run with the axes that `parallel: auto` stands for, and the line that says why; as it is without."""
    if run.parallel.axes != "auto":
        return run, []
    choice = choose_parallel(run, topology, estimator)
    return replace(run, parallel=choice.parallel), [choice.why]
