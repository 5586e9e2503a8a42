"""The train step of a run with shapes in place of arrays: all that a compiler, or a count of bytes, needs."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.hf.layout import abstract_model, model_leaves
from phi3_jax.hf.read import fused_rows
from phi3_jax.lora import Lora, ParameterTable, init_lora, parameter_table, partition, trainable_mask
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import SplitWeight
from phi3_jax.optim.optimizer import make_optimizer, make_schedule
from phi3_jax.parallel.layout import batch_sharding, shardings
from phi3_jax.parallel.mesh import AXES, mesh_shape
from phi3_jax.peft.adapter import load_adapter
from phi3_jax.performance.topology import Topology
from phi3_jax.quant import Int8Weight, NF4Weight
from phi3_jax.quant.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE
from phi3_jax.quant.quantize import is_quantizable
from phi3_jax.training.step import TrainState, make_train_step

BATCH = ("input_ids", "positions", "segment_ids", "loss_mask")


@dataclass(frozen=True)
class AbstractStep:
    """A step `function(state, frozen, batch) -> state` and its arguments, each a `jax.ShapeDtypeStruct`
    that says how it lies on the mesh. **Fields**: `table`, what trains.
    """

    function: Callable[..., TrainState]
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    mesh: Any
    table: ParameterTable

    def compile(self) -> Any:
        """Compiles it as `training.step.TrainStep` does, for the mesh's devices, which need not be here."""
        layout = jax.tree.map(lambda x: x.sharding, self.state)
        with jax.set_mesh(self.mesh):
            step = jax.jit(self.function, donate_argnums=0, out_shardings=layout)
            return step.lower(self.state, self.frozen, self.batch).compile()


def abstract_mesh(run: RunConfig, topology: Topology) -> AbstractMesh:
    """The mesh that `run.parallel` asks for, of no devices at all, but known to be for the topology's.

    Raises `InputError` where it does not divide their number.
    """
    shape = mesh_shape(asdict(run.parallel), topology.devices)
    device = AbstractDevice(topology.device_kind, None, topology.platform)
    return AbstractMesh(tuple(shape.values()), AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)


def abstract_step(run: RunConfig, config: Phi3Config, mesh: Any) -> AbstractStep:
    """The step that `training.job` and `training.loop` make of such a run, for the longest rows it allows.

    **Arguments**: `config`, the checkpoint's; `mesh`, of `parallel.mesh.make_mesh`, or one of no devices at
    all (`jax.sharding.AbstractMesh`), which is enough to trace the step.
    """
    training, full = run.training, run.peft.full_finetuning
    model, lora = abstract_model_and_lora(run, config, parts=mesh.shape["tensor"] > 1)
    graph, state = nnx.split(model)
    params = _laid_out({"model": state, "lora": lora}, mesh)
    freeze_A = training.optim == "lorafa"
    mask = trainable_mask(state, lora, full_finetuning=full, freeze_A=freeze_A)
    trainable, frozen = partition(params, mask)
    schedule = make_schedule(training, max(training.max_steps, 1000))
    dtype = jnp.dtype(run.model.dtype)

    # The optimizer is made while tracing, since LoRA-FA's takes arrays, and there are none outside.
    def create(trainable: Any, frozen: Any, key: Any) -> TrainState:
        return TrainState.create(trainable, make_optimizer(training, schedule, frozen["lora"]), key)

    def step(state: TrainState, frozen: Any, batch: Any) -> TrainState:
        return make_train_step(graph, dtype, make_optimizer(training, schedule, frozen["lora"]), training)(
            state, frozen, batch
        )

    first = jax.eval_shape(create, trainable, frozen, jax.eval_shape(lambda: jax.random.key(0)))
    rows = training.per_device_train_batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    shape = (training.gradient_accumulation_steps, rows, run.data.max_length)
    entry = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, 3))
    table = parameter_table(model, lora, freeze_A=freeze_A)
    return AbstractStep(step, _laid_out(first, mesh), frozen, dict.fromkeys(BATCH, entry), mesh, table)


def _laid_out(tree: Any, mesh: Any) -> Any:
    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings(tree, mesh))


def abstract_model_and_lora(
    run: RunConfig, config: Phi3Config, *, parts: bool = False
) -> tuple[Phi3ForCausalLM, Lora | None]:
    """What `training.start` loads and draws, as shapes. **Arguments**: `parts`, as in `hf.checkpoint.load_model`.

    Of `peft.init_from` the adapter itself is read. Raises `InputError` for what is wrong with `peft`.
    """
    section, full = run.model, run.peft.full_finetuning
    model = abstract_model(config, jnp.float32 if full else section.dtype, section.attention)
    lora = None if full else _abstract_lora(run, model)
    leaves = []
    for path, leaf in model_leaves(model).items():
        value: Any = leaf.get_value()
        rows = fused_rows(model, path) if parts and not full else None
        if section.quantization is not None and is_quantizable(path, value.shape):
            value = abstract_quantized(value, section.quantization, double_quant=section.double_quant)
        elif rows is not None:
            shapes = [(*value.shape[:-2], part.stop - part.start, value.shape[-1]) for part in rows]
            parted: Any = tuple(jax.ShapeDtypeStruct(shape, value.dtype) for shape in shapes)
            value = SplitWeight(parted)
        leaves.append((path, leaf.replace(value)))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(leaves)), lora


def _abstract_lora(run: RunConfig, model: Phi3ForCausalLM) -> Lora:
    peft = run.peft
    if peft.init_from is not None:
        lora = load_adapter(peft.init_from, model, **run.model.hub)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora)
    if peft.init_lora_weights in ("eva", "loftq"):
        # Both end in plain adapters; which ranks EVA moves from layer to layer only its data can tell.
        peft = replace(peft, init_lora_weights=True)
    graph, state = nnx.split(model)
    return jax.eval_shape(
        lambda state, key: init_lora(nnx.merge(graph, state), peft, key),
        state,
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def abstract_quantized(weight: jax.ShapeDtypeStruct, quantization: str, *, double_quant: bool) -> Any:
    """A stack of layers' weights `[layers, out, in]` as quantised: an `NF4Weight` or `Int8Weight` of shapes."""
    (*stack, rows, columns), shape = weight.shape, jax.ShapeDtypeStruct
    if quantization == "int8":
        return Int8Weight(shape(weight.shape, jnp.int8), shape((*stack, rows), jnp.float32))
    blocks = math.ceil(rows * columns / BLOCK_SIZE)
    if columns % BLOCK_SIZE == 0:
        codes, absmax = (*stack, rows, columns // 2), (*stack, rows, columns // BLOCK_SIZE)
    else:
        codes, absmax = (*stack, math.ceil(rows * columns / 2)), (*stack, blocks)
    nested, offset = None, None
    if double_quant:
        nested = shape((*stack, math.ceil(blocks / NESTED_BLOCK_SIZE)), jnp.float32)
        offset = shape(tuple(stack), jnp.float32)
    statistics = shape(absmax, jnp.uint8 if double_quant else jnp.float32)
    return NF4Weight(shape(codes, jnp.uint8), statistics, nested, offset, rows, columns, np.dtype(weight.dtype))
