"""The compiled steps: one optimizer step over an accumulated batch, and one batch of evaluation."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.stages import Compiled
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from phi3_jax.config.training import CompilerChoice, TrainingSection
from phi3_jax.data.batch import Batch
from phi3_jax.lora.mask import combine
from phi3_jax.lora.per_device import Shares, per_device, spread, summed
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.objectives.next_token import loss_sums, row_sums
from phi3_jax.parallel.compiler_options import compile_program
from phi3_jax.parallel.sharding import constrain
from phi3_jax.quant import is_quantized
from phi3_jax.system.compat import adds_to_some_of_a_scan
from phi3_jax.system.compat_jax import add_gradients
from phi3_jax.system.dotted import path_names
from phi3_jax.system.telling import taking, tell
from phi3_jax.training.nonfinite import Skips, choose


class Params(TypedDict):
    """Parameters, or the part of them that trains or that does not; None where a leaf is in the other part.

    Attributes:
        model: the model's state.
        lora: the adapter, None where the model itself trains.
    """

    model: nnx.State[Hashable, object]
    lora: Lora | None


Step = Callable[["TrainState", Params, Batch], "TrainState"]
# A step's program that is there already, for its arguments; None where there is none.
Ahead = Callable[["TrainState", Params, Batch], Compiled | None]
# Of every row the loss summed over target tokens, these tokens, and how many of them are the most likely ones.
RowSums = tuple[Float[Array, "batch"], Int[Array, "batch"], Int[Array, "batch"]]
EvalStep = Callable[[Params, Params, Batch], RowSums]


Sums = tuple[Float[Array, ""], Int[Array, ""], Float[Array, ""]]  # of loss, target tokens and attended keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Sums over the steps since the last line of metrics, kept on the device.

    Skipped steps count in `tokens` and `attended` alone.

    Attributes:
        loss: summed over target tokens.
        target_tokens: their number.
        tokens: all tokens, padding left out.
        attended: the keys that these tokens see.
        grad_norm: that of the last step, before clipping.
    """

    loss: Float[Array, ""]
    target_tokens: Int[Array, ""]
    tokens: Int[Array, ""]
    attended: Float[Array, ""]
    grad_norm: Float[Array, ""]

    @classmethod
    def empty(cls) -> "Window":
        # One array each: a donated buffer must not be given twice.
        return cls(*(jnp.zeros((), dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32, jnp.float32, jnp.float32)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes, and the key that its randomness is drawn from.

    Attributes:
        step: steps done, skipped ones too.
        trainable: the part of the parameters that trains.
        opt_state: the optimizer's, for these leaves alone.
        window: sums since the last line of metrics.
        key: the run's.
        skips: the steps that were left out.
        good: what `trainable` was before the last step that was taken, the newest of which a finite loss is known;
            None where the model itself trains, whose copy would be large.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: optax.OptState
    window: Window
    key: PRNGKeyArray
    skips: Skips
    good: Params | None

    @classmethod
    def create(cls, trainable: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> "TrainState":
        # Copied, since a donated buffer must not be given twice.
        good = None if trainable.get("lora") is None else jax.tree.map(jnp.copy, trainable)
        step = jnp.zeros((), jnp.int32)
        return cls(step, trainable, tx.init(trainable), Window.empty(), key, Skips.none(), good)


def model_and_lora(
    graph: nnx.GraphDef[Phi3ForCausalLM], trainable: Params, frozen: Params, dtype: jnp.dtype
) -> tuple[Phi3ForCausalLM, Lora | None]:
    """The model, computing in `dtype` whatever its parameters are kept in, and its adapter."""
    params: Params = combine(trainable, frozen)
    # Quantised weights are made dense in the type that their layer's input has.
    state = jax.tree.map(lambda x: x if is_quantized(x) else x.astype(dtype), params["model"], is_leaf=is_quantized)
    return nnx.merge(graph, state), params["lora"]


Objective = Callable[[Params, Params, Batch, PRNGKeyArray], tuple[Array, tuple[Array, Array]]]


def _objective(graph: nnx.GraphDef[Phi3ForCausalLM], dtype: jnp.dtype, training: TrainingSection) -> Objective:
    """Of a micro-batch `[batch, seq]` the loss summed over target tokens, their number and the keys attended to."""

    def objective(
        trainable: Params, frozen: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, tuple[Array, Array]]:
        model, lora = model_and_lora(graph, trainable, frozen, dtype)
        shares = Shares.of(*batch["input_ids"].shape)
        total, count, _ = loss_sums(
            model,
            lora if lora is None or shares.number == 1 else per_device(lora, shares),
            batch,
            dropout_key=key,
            remat=training.remat,
            chunk_mlp=training.chunk_mlp,
            label_smoothing=training.label_smoothing_factor,
            neftune_alpha=training.neftune_noise_alpha,
        )
        keys = jnp.minimum(batch["positions"] + 1.0, model.config.sliding_window or jnp.inf)
        return total, (count, jnp.sum(keys, where=batch["segment_ids"] != 0))

    return objective


def _gradients(
    objective: Objective, trainable: Params, frozen: Params, batch: Batch, key: PRNGKeyArray
) -> tuple[Sums, Params]:
    """What the objective gives, and its gradients, summed over all micro-batches."""
    # The backward pass adds to these in place, whichever layer and micro-batch it is at; each device to its own.
    shares = Shares.of(*batch["input_ids"].shape[1:])
    zeros = _spread(jax.tree.map(jnp.zeros_like, trainable), shares)
    trainable, frozen = _spread(gathered(trainable), shares), _spread(frozen, shares)
    refs = jax.tree.map(jax.new_ref, zeros)

    def micro_step(carry: Sums, micro: tuple[Array, Batch]) -> tuple[Sums, None]:
        index, micro_batch = micro
        micro_key = jax.random.fold_in(key, index)
        total, backward, (count, attended) = jax.vjp(
            lambda t: objective(t, frozen, micro_batch, micro_key), trainable, has_aux=True
        )
        if _adds_in_place(trainable["lora"]):
            add_gradients(backward, refs, jnp.ones_like(total))
        else:
            jax.tree.map(_add_to, refs, backward(jnp.ones_like(total))[0])
        return jax.tree.map(jnp.add, carry, (total, count, attended)), None

    start = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    indices = jnp.arange(batch["input_ids"].shape[0])
    sums, _ = jax.lax.scan(micro_step, start, (indices, batch))
    gradients = jax.tree.map(lambda ref: ref[...], refs)
    if shares.number > 1 and gradients["lora"] is not None:
        gradients = Params(model=gradients["model"], lora=summed(gradients["lora"]))
    return sums, gradients


def _spread(params: Params, shares: Shares) -> Params:
    """The layers' adapters with a copy for each device's share of the batch, where there are several."""
    if shares.number == 1 or params["lora"] is None:
        return params
    return Params(model=params["model"], lora=spread(params["lora"], shares))


def make_train_step(
    graph: nnx.GraphDef[Phi3ForCausalLM],
    dtype: jnp.dtype,
    tx: optax.GradientTransformation,
    training: TrainingSection,
) -> Step:
    """The step `(state, frozen, batch [accumulation, batch, seq]) -> state`, to be compiled.

    The gradient is that of the loss summed over all micro-batches, divided by the number of target
    tokens in all of them. It exists for `state.trainable` alone, once, and is summed in float32. Where
    the loss or the gradient's norm is not finite, parameters and optimizer stay as they are, bit for bit,
    and `state.skips` counts the step.
    """
    objective = _objective(graph, dtype, training)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)
        (total, count, attended), sums = _gradients(objective, state.trainable, frozen, batch, key)
        grads = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(total) & jnp.isfinite(norm)
        takes, skips = state.skips.judge(state.step, is_finite, training.max_skipped_steps)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
            updated = optax.apply_updates(state.trainable, updates)
        window = Window(
            loss=state.window.loss + jnp.where(takes, total, 0),
            target_tokens=state.window.target_tokens + jnp.where(takes, count, 0),
            tokens=state.window.tokens + jnp.sum(batch["segment_ids"] != 0),
            attended=state.window.attended + attended,
            grad_norm=jnp.where(takes, norm, state.window.grad_norm),
        )
        return TrainState(
            step=state.step + 1,
            trainable=choose(takes, updated, state.trainable),
            opt_state=choose(takes, opt_state, state.opt_state),
            window=window,
            key=state.key,
            skips=skips,
            good=None if state.good is None else choose(takes, state.trainable, state.good),
        )

    return train_step


def _add_to(ref: jax.Ref, value: Array) -> None:
    ref[...] += value


def _adds_in_place(lora: Lora | None) -> bool:
    """Whether the backward pass may add to the gradients layer by layer, not once it has those of all layers.

    Not where the model's own weights train: the layers are scanned over them and read them at an index too,
    which JAX has no accumulation for. Adapters that differ by layer, and saved weights of another type, are
    made of parameters, and are scanned over beside others that are parameters.
    """
    if lora is None:
        return False
    return adds_to_some_of_a_scan() or not (lora.saved or lora.differs_by_layer)


def gathered(trainable: Params) -> Params:
    """On a mesh: adapters made whole on every device, once a step, instead of in every layer."""

    def leaf(path: tuple[object, ...], x: Array) -> Array:
        return constrain(x, *[None] * x.ndim) if "adapters" in path_names(path) else x

    result: Params = jax.tree_util.tree_map_with_path(leaf, trainable)
    return result


def compile_step(
    function: Step,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    options: CompilerChoice = "auto",
    say: Callable[[str], None] = tell,
) -> Compiled:
    """The step compiled for the mesh in use, of arrays or of shapes that say how they lie; the state is donated.

    Args:
        function: The step.
        state: What it changes.
        frozen: The other parameters.
        batch: The rows.
        options: `training.compiler_options`.
        say: What is told of options that the compiler does not know.
    """
    # The state goes out as it came in, or the next step would be another program.
    layout = jax.tree.map(lambda x: x.sharding, state)
    lowered = jax.jit(function, donate_argnums=0, out_shardings=layout).lower(state, frozen, batch)
    return compile_program(lowered, options, say)


class TrainStep:
    """The step compiled, once for each shape of batch; state donated, frozen parameters never.

    Args:
        function: the step.
        options: `training.compiler_options`.
        ahead: gives a program that is compiled already, or None.
    """

    def __init__(self, function: Step, options: CompilerChoice = "auto", ahead: Ahead | None = None):
        self._function, self._options, self._ahead = function, options, ahead
        self._compiled: dict[tuple[int, ...], Compiled] = {}

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def is_compiled(self, batch: Batch) -> bool:
        return batch["input_ids"].shape in self._compiled

    def compile(self, state: TrainState, frozen: Params, batch: Batch) -> Compiled:
        """Compiles ahead of the first call, so that a clock need not run meanwhile; gives the program."""
        program = None if self._ahead is None else self._ahead(state, frozen, batch)
        if program is None:
            program = self._compile(state, frozen, batch)
        self._compiled[batch["input_ids"].shape] = program
        return program

    def _compile(self, state: TrainState, frozen: Params, batch: Batch) -> Compiled:
        with taking("compiling the train step"):
            return compile_step(self._function, state, frozen, batch, self._options)

    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> TrainState:
        if not self.is_compiled(batch):
            self.compile(state, frozen, batch)
        result: TrainState = self._compiled[batch["input_ids"].shape](state, frozen, batch)
        return result


def make_eval_step(graph: nnx.GraphDef[Phi3ForCausalLM], dtype: jnp.dtype) -> EvalStep:
    """Compiled `(trainable, frozen, batch [batch, seq]) -> RowSums`.

    On a mesh every device gets those of all rows. Models of one shape share their programs.
    """
    return partial(_eval_step, graph, dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _eval_step(
    graph: nnx.GraphDef[Phi3ForCausalLM], dtype: jnp.dtype, trainable: Params, frozen: Params, batch: Batch
) -> RowSums:
    model, lora = model_and_lora(graph, trainable, frozen, dtype)
    loss, count, correct = row_sums(model, lora, batch)
    return constrain(loss, None), constrain(count, None), constrain(correct, None)
