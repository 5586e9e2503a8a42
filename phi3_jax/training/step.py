"""The compiled steps: one optimizer step over an accumulated batch, and one batch of evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.config.sections import TrainingSection
from phi3_jax.lora.mask import combine
from phi3_jax.lora.tree import Lora
from phi3_jax.objectives.next_token import loss_sums, row_sums
from phi3_jax.parallel.sharding import constrain
from phi3_jax.quant import is_quantized
from phi3_jax.system import compat
from phi3_jax.system.dotted import path_names
from phi3_jax.training.nonfinite import Skips, choose

Params = dict[str, Any]  # {"model": the model's state, "lora": Lora | None}; None where a leaf is elsewhere


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Sums over the steps since the last line of metrics, kept on the device.

    **Fields**: `loss`, summed over target tokens; `target_tokens`; `tokens`, padding left out;
    `attended`, the keys that these tokens see; `grad_norm`, of the last step, before clipping. Skipped
    steps count in `tokens` and `attended` alone.
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

    **Fields**: `step`, steps done, skipped ones too; `trainable`, the part of the parameters that trains
    (None elsewhere); `opt_state`, the optimizer's, for these leaves alone; `key`, the run's; `skips`, the
    steps that were left out; `good`, what `trainable` was before the last step that was taken, the newest
    of which a finite loss is known, None where the model itself trains, whose copy would be large.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
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


def model_and_lora(graph: Any, trainable: Params, frozen: Params, dtype: Any) -> tuple[Any, Any]:
    """The model, computing in `dtype` whatever its parameters are kept in, and its adapter."""
    params = combine(trainable, frozen)
    # Quantised weights are made dense in the type that their layer's input has.
    state = jax.tree.map(lambda x: x if is_quantized(x) else x.astype(dtype), params["model"], is_leaf=is_quantized)
    return nnx.merge(graph, state), params["lora"]


def make_train_step(
    graph: Any, dtype: Any, tx: optax.GradientTransformation, training: TrainingSection
) -> Callable[[TrainState, Params, dict[str, Array]], TrainState]:
    """The step `(state, frozen, batch [accumulation, batch, seq]) -> state`, to be compiled.

    The gradient is that of the loss summed over all micro-batches, divided by the number of target
    tokens in all of them. It exists for `state.trainable` alone, once, and is summed in float32. Where
    the loss or the gradient's norm is not finite, parameters and optimizer stay as they are, bit for bit,
    and `state.skips` counts the step.
    """

    def objective(
        trainable: Params, frozen: Params, batch: Any, key: PRNGKeyArray
    ) -> tuple[Array, tuple[Array, Array]]:
        model, lora = model_and_lora(graph, trainable, frozen, dtype)
        total, count, _ = loss_sums(
            model,
            lora,
            batch,
            dropout_key=key,
            remat=training.remat,
            label_smoothing=training.label_smoothing_factor,
            neftune_alpha=training.neftune_noise_alpha,
        )
        keys = jnp.minimum(batch["positions"] + 1.0, model.config.sliding_window or jnp.inf)
        return total, (count, jnp.sum(keys, where=batch["segment_ids"] != 0))

    def train_step(state: TrainState, frozen: Params, batch: dict[str, Array]) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)
        trainable = gathered(state.trainable)
        # The backward pass adds to these in place, whichever layer and micro-batch it is at.
        sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), trainable)

        def micro_step(carry: Any, micro: tuple[Array, dict[str, Array]]) -> tuple[Any, None]:
            index, micro_batch = micro
            micro_key = jax.random.fold_in(key, index)
            backward: Any  # what adds to references is not in jax's annotations yet
            total, backward, (count, attended) = jax.vjp(
                lambda t: objective(t, frozen, micro_batch, micro_key), trainable, has_aux=True
            )
            if _adds_in_place(trainable["lora"]):
                backward.with_refs(sums)(jnp.ones_like(total))
            else:
                jax.tree.map(_add_to, sums, backward(jnp.ones_like(total))[0])
            return jax.tree.map(jnp.add, carry, (total, count, attended)), None

        start = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        indices = jnp.arange(batch["input_ids"].shape[0])
        (total, count, attended), _ = jax.lax.scan(micro_step, start, (indices, batch))
        grads = jax.tree.map(lambda ref: ref[...] / jnp.maximum(count, 1), sums)
        norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(total) & jnp.isfinite(norm)
        takes, skips = state.skips.judge(state.step, is_finite, training.max_skipped_steps)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        window = Window(
            loss=state.window.loss + jnp.where(takes, total, 0),
            target_tokens=state.window.target_tokens + jnp.where(takes, count, 0),
            tokens=state.window.tokens + jnp.sum(batch["segment_ids"] != 0),
            attended=state.window.attended + attended,
            grad_norm=jnp.where(takes, norm, state.window.grad_norm),
        )
        return TrainState(
            step=state.step + 1,
            trainable=choose(takes, optax.apply_updates(state.trainable, updates), state.trainable),
            opt_state=choose(takes, opt_state, state.opt_state),
            window=window,
            key=state.key,
            skips=skips,
            good=None if state.good is None else choose(takes, state.trainable, state.good),
        )

    return train_step


def _add_to(ref: Any, value: Array) -> None:
    ref[...] += value


def _adds_in_place(lora: Lora | None) -> bool:
    """Whether the backward pass may add to the gradients layer by layer, not once it has those of all layers.

    Not where the model's own weights train: the layers are scanned over them and read them at an index too,
    which JAX has no accumulation for. Adapters that differ by layer, and saved weights of another type, are
    made of parameters, and are scanned over beside others that are parameters.
    """
    if lora is None:
        return False
    return compat.adds_to_some_of_a_scan() or not (lora.saved or lora.differs_by_layer)


def gathered(trainable: Params) -> Params:
    """On a mesh: adapters made whole on every device, once a step, instead of in every layer."""

    def leaf(path: Any, x: Array) -> Array:
        return constrain(x, *[None] * x.ndim) if "adapters" in path_names(path) else x

    return jax.tree_util.tree_map_with_path(leaf, trainable)


class TrainStep:
    """The step compiled, once for each shape of batch; state donated, frozen parameters never."""

    def __init__(self, function: Callable[[TrainState, Params, dict[str, Array]], TrainState]):
        self._function = function
        self._compiled: dict[tuple[int, ...], Any] = {}

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def is_compiled(self, batch: dict[str, Array]) -> bool:
        return batch["input_ids"].shape in self._compiled

    def compile(self, state: TrainState, frozen: Params, batch: dict[str, Array]) -> None:
        """Compiles ahead of the first call, so that a clock need not run meanwhile."""
        # The state goes out as it came in, or the next step would be another program.
        layout = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(self._function, donate_argnums=0, out_shardings=layout)
        self._compiled[batch["input_ids"].shape] = step.lower(state, frozen, batch).compile()

    def __call__(self, state: TrainState, frozen: Params, batch: dict[str, Array]) -> TrainState:
        if not self.is_compiled(batch):
            self.compile(state, frozen, batch)
        return self._compiled[batch["input_ids"].shape](state, frozen, batch)


def make_eval_step(graph: Any, dtype: Any) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiled `(trainable, frozen, batch [batch, seq]) -> (loss sum, target tokens, correct)`, each `[batch]`.

    On a mesh every device gets those of all rows. Models of one shape share their programs.
    """
    return partial(_eval_step, graph, dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _eval_step(
    graph: Any, dtype: Any, trainable: Params, frozen: Params, batch: dict[str, Array]
) -> tuple[Array, Array, Array]:
    model, lora = model_and_lora(graph, trainable, frozen, dtype)
    loss, count, correct = row_sums(model, lora, batch)
    return constrain(loss, None), constrain(count, None), constrain(correct, None)
