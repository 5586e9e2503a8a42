"""The train step of a run with shapes in place of arrays: all that a compiler, or a count of bytes, needs."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.config.training import CompilerChoice
from phi3_jax.data.batch import TRAINING_KEYS
from phi3_jax.hf.bnb import read_bnb_config
from phi3_jax.hf.files import CONFIG
from phi3_jax.lora import Lora, ParameterTable, init_lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.leaves import LeafPath, abstract_model, shape_of
from phi3_jax.optim.optimizer import make_optimizer
from phi3_jax.optim.schedule import make_schedule
from phi3_jax.parallel.layout import batch_sharding, shardings
from phi3_jax.parallel.mesh import pass_rows, platform
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.quant import Int8Weight, NF4Weight, Quantized
from phi3_jax.quant.blocks import BLOCK_SIZE, NESTED_BLOCK_SIZE
from phi3_jax.quant.build import Leaf, build_model
from phi3_jax.quant.nf4 import is_by_halves
from phi3_jax.quant.quantize import is_quantizable
from phi3_jax.system.telling import tell
from phi3_jax.training.split import split_parameters
from phi3_jax.training.step import TrainState, compile_step, make_train_step


@dataclass(frozen=True)
class AbstractStep:
    """A step `function(state, frozen, batch) -> state` and its arguments, each a `jax.ShapeDtypeStruct`
    that says how it lies on the mesh.

    Attributes:
        table: What trains.
        options: `training.compiler_options`.
    """

    function: Callable[..., TrainState]
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    mesh: Any
    table: ParameterTable
    options: CompilerChoice = "auto"

    def compile(self, say: Callable[[str], None] = tell) -> Any:
        """Compiles it as `training.step.TrainStep` does, for the mesh's devices, which need not be here.

        `say` is told of compiler options that are left out.
        """
        with jax.set_mesh(self.mesh):
            return compile_step(self.function, self.state, self.frozen, self.batch, self.options, say)


def abstract_step(
    run: RunConfig,
    config: Phi3Config,
    mesh: Mesh | AbstractMesh,
    *,
    total_steps: int | None = None,
    length: int | None = None,
    adapter: PeftAdapter | None = None,
) -> AbstractStep:
    """The step that `training.job` and `training.trainer` make of such a run, for the longest rows it allows.

    Args:
        run: All of it.
        config: The checkpoint's.
        mesh: Of `parallel.mesh.make_mesh`, or one of no devices at all (`jax.sharding.AbstractMesh`), which is enough
            to trace the step.
        total_steps: Over which the learning rate has its course, where that is known already.
        length: Positions of a row, where it is not `data.max_length`.
        adapter: That of `peft.init_from`, where it is open already.
    """
    training = run.training
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model, lora = abstract_model_and_lora(run, config, split=mesh.shape["tensor"] > 1, adapter=adapter)
    parts = split_parameters(run, model, lora, lambda params: _laid_out(params, mesh))
    schedule = make_schedule(training, total_steps or max(training.max_steps, 1000))

    # The optimizer is made while tracing, since LoRA-FA's takes arrays, and there are none outside.
    def create(trainable: Any, frozen: Any, key: Any) -> TrainState:
        return TrainState.create(trainable, make_optimizer(training, schedule, frozen["lora"]), key)

    def step(state: TrainState, frozen: Any, batch: Any) -> TrainState:
        return make_train_step(parts.graph, parts.dtype, make_optimizer(training, schedule, frozen["lora"]), training)(
            state, frozen, batch
        )

    first = jax.eval_shape(create, parts.trainable, parts.frozen, jax.eval_shape(lambda: jax.random.key(0)))
    rows = pass_rows(training.per_device_train_batch_size, mesh.shape)
    shape = (training.gradient_accumulation_steps, rows, length or run.data.limit)
    entry = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, 3))
    batch = dict.fromkeys(TRAINING_KEYS, entry)
    return AbstractStep(step, _laid_out(first, mesh), parts.frozen, batch, mesh, parts.table, training.compiler_options)


def _laid_out(tree: Any, mesh: Any) -> Any:
    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings(tree, mesh))


def abstract_model_and_lora(
    run: RunConfig, config: Phi3Config, *, split: bool = False, adapter: PeftAdapter | None = None
) -> tuple[Phi3ForCausalLM, Lora | None]:
    """What `training.start` loads and draws, as shapes, for devices of the mesh in use.

    Of `peft.init_from` the adapter itself is read.

    Args:
        run: The run.
        config: The checkpoint's.
        split: As in `Checkpoint.load_model`.
        adapter: That of `peft.init_from`, where it is open already.

    Raises:
        InputError: For what is wrong with `peft`.
    """
    section, full = run.model, run.peft.full_finetuning
    model = abstract_model(config, jnp.float32 if full else section.dtype, section.attention)
    lora = None if full else _abstract_lora(run, model, adapter)
    stored = read_bnb_config(config, Path(CONFIG))
    shapes = _Shapes(section.quantization, section.double_quant, None if stored is None else stored.paths)
    return build_model(model, shapes, split=split and not full), lora


@dataclass(frozen=True)
class _Shapes:
    """Shapes as the source of a model's leaves."""

    quantization: str | None
    double_quant: bool
    stored: Collection[LeafPath] | None  # of a checkpoint that is quantised already, the leaves that are

    def quantizes(self, path: LeafPath, leaf: Leaf) -> bool:
        if self.quantization is not None and self.stored is not None:
            return path in self.stored
        return self.quantization is not None and is_quantizable(path, leaf.shape)

    def quantized(self, path: LeafPath, leaf: Leaf) -> Quantized:
        return abstract_quantized(leaf.get_value(), str(self.quantization), double_quant=self.double_quant)

    def dense(self, path: LeafPath, leaf: Leaf, rows: slice | None = None) -> jax.Array:
        value: jax.Array = leaf.get_value()
        if rows is None:
            return value
        return shape_of((*value.shape[:-2], rows.stop - rows.start, value.shape[-1]), value.dtype)


def _abstract_lora(run: RunConfig, model: Phi3ForCausalLM, adapter: PeftAdapter | None) -> Lora:
    peft = run.peft
    if peft.init_from is not None:
        adapter = PeftAdapter.open(peft.init_from, run.model.hub.at(None)) if adapter is None else adapter
        lora = adapter.load(model, lora_dropout=run.peft.lora_dropout)
        shapes: Lora = jax.eval_shape(lambda: lora)
        return shapes
    if peft.init_lora_weights in ("eva", "loftq"):
        # Both end in plain adapters; which ranks EVA moves from layer to layer only its data can tell.
        peft = replace(peft, init_lora_weights=True)
    graph, state = nnx.split(model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh: Lora = jax.eval_shape(lambda state, key: init_lora(nnx.merge(graph, state), peft, key), state, key)
    return fresh


def abstract_quantized(weight: jax.Array, quantization: str, *, double_quant: bool) -> Quantized:
    """A stack of layers' weights `[layers, out, in]` as quantised: an `NF4Weight` or `Int8Weight` of shapes."""
    *stack, rows, columns = weight.shape
    if quantization == "int8":
        return Int8Weight(shape_of(weight.shape, jnp.int8), shape_of((*stack, rows), jnp.float32))
    blocks = math.ceil(rows * columns / BLOCK_SIZE)
    if columns % BLOCK_SIZE == 0:
        codes, absmax = (*stack, rows, columns // 2), (*stack, rows, columns // BLOCK_SIZE)
    else:
        codes, absmax = (*stack, math.ceil(rows * columns / 2)), (*stack, blocks)
    nested, offset = None, None
    if double_quant:
        nested = shape_of((*stack, math.ceil(blocks / NESTED_BLOCK_SIZE)), jnp.float32)
        offset = shape_of(tuple(stack), jnp.float32)
    statistics = shape_of(absmax, jnp.uint8 if double_quant else jnp.float32)
    by_halves = is_by_halves(columns, platform())
    dtype = np.dtype(weight.dtype)
    return NF4Weight(shape_of(codes, jnp.uint8), statistics, nested, offset, rows, columns, dtype, by_halves)
