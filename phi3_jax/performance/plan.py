"""The plan of a run: whether it fits, what it needs, how long a step takes, and what to change."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.files import CONFIG
from phi3_jax.model.leaves import model_leaves
from phi3_jax.parallel.hardware import GiB, hardware
from phi3_jax.parallel.mesh import mesh_shape
from phi3_jax.peft.continued import as_trained, open_run_base
from phi3_jax.performance.choose import with_chosen_axes
from phi3_jax.performance.compile import Compiled, compile_elsewhere, why_not_compiled
from phi3_jax.performance.memory import ESTIMATE_MARGIN, Estimator, Memory
from phi3_jax.performance.step_time import StepTime, step_time
from phi3_jax.performance.suggest import Alternative, alternatives
from phi3_jax.performance.topology import JAX_GPU_SHARE, Topology, abstract_mesh, parse_topology
from phi3_jax.training.abstract import abstract_step
from phi3_jax.training.checks import check_length, check_mesh


@dataclass(frozen=True)
class Plan:
    """What is planned of a run, for the devices of a topology.

    Attributes:
        run: With what the checkpoint says beside it.
        mesh: The size of each axis.
        parameters: Of the base.
        memory: Of each device.
        compiled: None where it is estimated.
        alternatives: With which it would fit.
        notes: Lines that a user should see.
    """

    run: RunConfig
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    trainable_parameters: int
    memory: Memory
    compiled: Compiled | None
    time: StepTime
    alternatives: list[Alternative]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return (self.compiled is None or self.compiled.fits) and self.memory.total <= self.topology.hbm

    def to_dict(self) -> dict[str, object]:
        """What `phi3-jax plan --json` prints."""
        time = self.time
        return {
            "fits": self.fits,
            "hbm_bytes_per_device": self.memory.total,
            "hbm_limit_bytes": self.topology.hbm,
            "basis": "estimated" if self.compiled is None else "compiled",
            "bytes_per_device": self.memory.by_kind(),
            "host_bytes_per_device": self.memory.host,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "flops_per_token": time.flops_per_token,
            "computed_flops_per_token": time.computed_per_token,
            "tokens_per_step": time.tokens,
            "step_seconds": time.seconds,
            "tokens_per_second": time.tokens_per_second,
            "time_basis": time.basis,
            "topology": self.topology.name,
            "device_kind": self.topology.device_kind,
            "devices": self.topology.devices,
            "mesh": self.mesh,
            "collectives_per_layer": self.compiled.collectives if self.compiled else None,
            "compile_seconds": self.compiled.seconds if self.compiled else None,
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
            "notes": self.notes,
        }


def make_plan(run: RunConfig, topology_name: str, *, estimate: bool = False) -> Plan:
    """The plan of a run on the topology of that name (`plan.topology.parse_topology`).

    For TPUs, where libtpu is installed, for NVIDIA's cards, where JAX's plug-in is, and for this machine's CPU the
    step is compiled; else, and with `estimate`, its memory is estimated. Of the checkpoint only config.json is read,
    or downloaded.

    Raises:
        InputError: Before anything is compiled, where model, rows, mesh and devices do not go together.
    """
    topology = parse_topology(topology_name)
    checkpoint = open_run_base(run, patterns=(CONFIG,))
    run, _ = as_trained(run, checkpoint)
    run, config = as_stored(run, checkpoint), checkpoint.config
    check_length(run.data.limit, config)
    estimator = Estimator(config)
    run, chosen = with_chosen_axes(run, topology, estimator)
    mesh = mesh_shape(run.parallel.sizes, topology.devices)
    check_mesh(run, config, mesh)
    memory = estimator(run, topology)
    table = abstract_step(run, config, abstract_mesh(run, topology)).table
    compiled, said = _compiled(run, config, topology, estimate)
    notes = chosen + said
    factor = 1.0
    if compiled is not None:
        factor = max(1.0, compiled.bytes_per_device / memory.total)
        memory = replace(memory.with_total(compiled.bytes_per_device), host=compiled.host_bytes_per_device)
    plan = Plan(
        run=run,
        topology=topology,
        mesh=mesh,
        parameters=sum(math.prod(leaf.shape) for leaf in model_leaves(checkpoint.shapes).values()),
        trainable_parameters=table.trainable,
        memory=memory,
        compiled=compiled,
        time=step_time(run, config, mesh, table.trainable, topology, compiled.cost if compiled else None),
        alternatives=[],
        notes=notes,
    )
    notes += _notes(plan)
    return plan if plan.fits else replace(plan, alternatives=alternatives(run, topology, estimator, factor))


def as_stored(run: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The run with its checkpoint's folder, and quantised if that is."""
    model = replace(run.model, name_or_path=str(checkpoint.folder))
    stored = checkpoint.quantization
    if stored is not None:
        # fp4 is kept as nf4 is, with other numbers for the codes.
        kind: Literal["int8", "nf4"] = "int8" if stored.kind == "int8" else "nf4"
        model = replace(model, quantization=kind, double_quant=stored.double_quant)
    return replace(run, model=model)


def _compiled(
    run: RunConfig, config: Phi3Config, topology: Topology, estimate: bool
) -> tuple[Compiled | None, list[str]]:
    """The compiled step's figures, None where it is to be or has to be estimated; and lines that say why."""
    if estimate:
        return None, []
    missing = why_not_compiled(topology)
    if missing is not None:
        return None, [f"memory is an estimate: {missing}"]
    try:
        compiled = compile_elsewhere(run, config, topology.name)
        return compiled, list(compiled.notices)
    except RuntimeError as error:
        return None, [f"memory is an estimate: {error}"]


def _notes(plan: Plan) -> list[str]:
    notes = []
    idle = plan.topology.devices - math.prod(plan.mesh.values())
    if idle:
        notes.append(f"{idle} of the {plan.topology.devices} devices are idle: parallel.fsdp -1 takes them all")
    share = plan.memory.total / plan.topology.hbm
    if plan.compiled is None and 1 - ESTIMATE_MARGIN < share < 1 + ESTIMATE_MARGIN:
        notes.append(f"too close to tell: estimates are off by up to {ESTIMATE_MARGIN:.0%}")
    if plan.topology.platform == "gpu" and JAX_GPU_SHARE < share <= 1:
        notes.append(
            f"JAX takes {JAX_GPU_SHARE:.0%} of a GPU's memory unless told otherwise, and this is {share:.0%}: set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
        )
    peaks = hardware(plan.topology.device_kind)
    if peaks is not None and peaks.float32 is not None and plan.run.model.dtype == "bfloat16":
        notes.append(
            f"{plan.topology.device_kind} has no bfloat16, which XLA computes in float32, at {peaks.float32 / 1e12:g} "
            f"TFLOP/s in place of {peaks.flops / 1e12:g}: model.dtype float16 is faster, in which numbers above 65,504 "
            "are infinite"
        )
    return notes


def print_plan(plan: Plan) -> None:
    """Prints it for people."""
    topology, memory, time = plan.topology, plan.memory, plan.time
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    how = "estimated" if plan.compiled is None else f"compiled in {plan.compiled.seconds:.0f} s"
    where = "" if plan.run.peft.full_finetuning else ", in the adapter"
    print(f"{plan.run.model.name_or_path}: {plan.parameters:,} parameters; {plan.trainable_parameters:,} train{where}")
    print(f"{topology.name}: {topology.devices} x {topology.device_kind}{f' ({axes})' if axes else ''}")
    verdict = "fits" if plan.fits else "does not fit"
    print(f"{verdict}: {memory.total / GiB:.2f} of {topology.hbm / GiB:.2f} GiB on each device, {how}")
    rows = {f"  {name}": f"{size / GiB:7.2f} GiB" for name, size in memory.by_kind().items()}
    if memory.host:
        rows["  in the host's memory"] = f"{memory.host / GiB:7.2f} GiB"
    rows["FLOP a token"] = f"{time.flops_per_token:.4g}"
    if time.computed_per_token > time.flops_per_token:
        rows["FLOP a token"] += f"; {time.computed_per_token:.4g} with what is computed twice"
    rows["tokens in a step"] = f"{time.tokens:,}"
    if time.seconds is not None and time.tokens_per_second is not None:
        rows["step"] = f"{time.seconds[0]:.3g} to {time.seconds[1]:.3g} s"
        rows["tokens a second"] = f"{time.tokens_per_second[0]:,.0f} to {time.tokens_per_second[1]:,.0f}"
    rows["basis"] = time.basis
    for name, loop in (plan.compiled.collectives if plan.compiled else {}).items():
        if loop:
            rows[f"sent in a layer, {name}"] = "; ".join(f"{count} x {what}" for what, count in loop.items())
    for name, text in rows.items():
        print(f"{name:<17} {text}")
    for note in plan.notes:
        print(f"note: {note}")
    if not plan.fits:
        _print_alternatives(plan)


def _print_alternatives(plan: Plan) -> None:
    if not plan.alternatives:
        print("nothing that plan knows of makes it fit: take a smaller model, or larger devices")
        return
    print("any one of these lines makes it fit, by the estimate:")
    for alternative in plan.alternatives:
        options = " ".join(f"--{name} {_text(value)}" for name, value in alternative.changes.items())
        print(f"  {options}  ({alternative.bytes_per_device / GiB:.2f} GiB)")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
