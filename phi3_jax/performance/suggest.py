"""What to change where a run does not fit, each change checked by the estimate."""

import math
from dataclasses import dataclass

from phi3_jax.config.run import RunConfig
from phi3_jax.model.remat import POLICIES
from phi3_jax.parallel.mesh import mesh_shape
from phi3_jax.performance.memory import Estimator
from phi3_jax.performance.topology import Topology, larger, parse_topology
from phi3_jax.system.errors import InputError
from phi3_jax.training.checks import check_mesh

Changes = dict[str, bool | int | str]  # section.key -> value; `topology` -> name

SHORTEST = 256  # tokens in a row; shorter ones are not proposed


@dataclass(frozen=True)
class Alternative:
    """Changes of a run with which it fits.

    Attributes:
        changes: By key of the run, and `topology`.
        bytes_per_device: As estimated.
    """

    changes: Changes
    bytes_per_device: int


def alternatives(run: RunConfig, topology: Topology, estimator: Estimator, factor: float = 1.0) -> list[Alternative]:
    """The changes with which the run fits, of every sort the smallest; where none is enough by itself, as many
    of them together as it takes. Empty where even all of them are not enough.

    Args:
        run: That does not fit.
        topology: The devices.
        estimator: Of the checkpoint's memory.
        factor: How much more than estimated the run itself was found to take.
    """
    sorts = [sort for sort in _sorts(run, topology) if sort]
    found = [_first(run, topology, estimator, factor, sort) for sort in sorts]
    single = [alternative for alternative in found if alternative is not None]
    if single:
        return single
    together: list[Changes] = [{}]
    for sort in sorts:
        together.append({**together[-1], **sort[-1]})
    several = _first(run, topology, estimator, factor, together[2:])
    return [several] if several else []


def _first(
    run: RunConfig, topology: Topology, estimator: Estimator, factor: float, tried: list[Changes]
) -> Alternative | None:
    """The first of the changes with which the run fits."""
    for changes in tried:
        where = parse_topology(str(changes["topology"])) if "topology" in changes else topology
        try:
            other = run.changed({name: value for name, value in changes.items() if name != "topology"})
            check_mesh(other, estimator.config, mesh_shape(other.parallel.sizes, where.devices))
            needed = round(factor * estimator(other, where).total)
        except InputError:  # not for this model, mesh or device
            continue
        if needed <= where.hbm:
            return Alternative(changes, needed)
    return None


def _sorts(run: RunConfig, topology: Topology) -> list[list[Changes]]:
    """Changes by sort, what costs least first; within a sort each saves more than the one before."""
    return [
        _remat(run),
        _batch(run),
        [{"training.optim": "adamw_8bit"}] if run.peft.full_finetuning and run.training.optim == "adamw" else [],
        _idle_devices(run, topology),
        [{"model.quantization": "nf4"}] if run.model.quantization is None else [],
        _offload(run, topology),
        _length(run),
        _more_devices(run, topology),
    ]


def _remat(run: RunConfig) -> list[Changes]:
    lighter = POLICIES[POLICIES.index(run.training.remat) + 1 : POLICIES.index("full") + 1]
    return [{"training.gradient_checkpointing": True, "training.remat_policy": policy} for policy in lighter]


def _offload(run: RunConfig, topology: Topology) -> list[Changes]:
    if topology.platform == "cpu" or run.training.remat == "offload":
        return []
    return [{"training.gradient_checkpointing": True, "training.remat_policy": "offload"}]


def _batch(run: RunConfig) -> list[Changes]:
    """Fewer rows at a time, and as many in a step."""
    rows, times = run.training.per_device_train_batch_size, run.training.gradient_accumulation_steps
    return [
        {
            "training.per_device_train_batch_size": fewer,
            "training.gradient_accumulation_steps": times * rows // fewer,
        }
        for fewer in range(rows - 1, 0, -1)
        if rows % fewer == 0
    ]


def _idle_devices(run: RunConfig, topology: Topology) -> list[Changes]:
    idle = topology.devices // _used(run, topology)
    fsdp = run.parallel.fsdp
    return [{"parallel.fsdp": fsdp * idle}] if idle > 1 and fsdp != -1 else []


def _length(run: RunConfig) -> list[Changes]:
    lengths, length = [], run.data.limit // 2
    while length >= SHORTEST:
        lengths.append(length)
        length //= 2
    return [{"data.max_length": length} for length in lengths]


def _more_devices(run: RunConfig, topology: Topology) -> list[Changes]:
    """The same on more devices of the kind, which share the weights."""
    if run.parallel.fsdp == -1:
        return [{"topology": name} for name, _ in larger(topology)]
    used, fsdp = _used(run, topology), run.parallel.fsdp
    return [{"topology": name, "parallel.fsdp": fsdp * number // used} for name, number in larger(topology)]


def _used(run: RunConfig, topology: Topology) -> int:
    return math.prod(mesh_shape(run.parallel.sizes, topology.devices).values())
