"""The compiled steps: one optimizer step over an accumulated batch, and one batch of evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.lora.mask import combine
from phi3_jax.quant import is_quantized
from phi3_jax.run_config import TrainingSection
from phi3_jax.training.loss import loss_sums

Params = dict[str, Any]  # {"model": the model's state, "lora": Lora | None}; None where a leaf is elsewhere


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Sums over the steps since the last line of metrics, kept on the device.

    **Fields**: `loss`, summed over target tokens; `target_tokens`; `tokens`, padding left out;
    `attended`, the keys that these tokens see; `grad_norm`, of the last step, before clipping.
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

    **Fields**: `step`, optimizer steps done; `trainable`, the part of the parameters that trains
    (None elsewhere); `opt_state`, the optimizer's, for these leaves alone; `key`, the run's.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: Any
    window: Window
    key: PRNGKeyArray

    @classmethod
    def create(cls, trainable: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), Window.empty(), key)


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
    tokens in all of them. It exists for `state.trainable` alone and is summed in float32.
    """

    def objective(trainable: Params, frozen: Params, batch: Any, key: PRNGKeyArray) -> tuple[Array, Array]:
        model, lora = model_and_lora(graph, trainable, frozen, dtype)
        total, count, _ = loss_sums(
            model,
            lora,
            batch,
            dropout_key=key,
            remat=training.gradient_checkpointing,
            label_smoothing=training.label_smoothing_factor,
            neftune_alpha=training.neftune_noise_alpha,
        )
        return total, count

    def train_step(state: TrainState, frozen: Params, batch: dict[str, Array]) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)

        def micro_step(carry: Any, micro: tuple[Array, dict[str, Array]]) -> tuple[Any, None]:
            index, micro_batch = micro
            differentiate = jax.value_and_grad(objective, has_aux=True)
            (total, count), grads = differentiate(state.trainable, frozen, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, (grads, total, count)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        start = zeros, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        indices = jnp.arange(batch["input_ids"].shape[0])
        (grads, total, count), _ = jax.lax.scan(micro_step, start, (indices, batch))
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        real = batch["segment_ids"] != 0
        window = Window(
            loss=state.window.loss + total,
            target_tokens=state.window.target_tokens + count,
            tokens=state.window.tokens + jnp.sum(real),
            attended=state.window.attended + jnp.sum(batch["positions"] + 1.0, where=real),
            grad_norm=optax.tree.norm(grads),
        )
        return TrainState(
            step=state.step + 1,
            trainable=optax.apply_updates(state.trainable, updates),
            opt_state=opt_state,
            window=window,
            key=state.key,
        )

    return train_step


class TrainStep:
    """The step compiled, once for each shape of batch; state donated, frozen parameters never."""

    def __init__(self, function: Callable[[TrainState, Params, dict[str, Array]], TrainState]):
        self._jitted = jax.jit(function, donate_argnums=0)
        self._compiled: dict[tuple[int, ...], Any] = {}

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def is_compiled(self, batch: dict[str, Array]) -> bool:
        return batch["input_ids"].shape in self._compiled

    def compile(self, state: TrainState, frozen: Params, batch: dict[str, Array]) -> None:
        """Compiles ahead of the first call, so that a clock need not run meanwhile."""
        self._compiled[batch["input_ids"].shape] = self._jitted.lower(state, frozen, batch).compile()

    def __call__(self, state: TrainState, frozen: Params, batch: dict[str, Array]) -> TrainState:
        if not self.is_compiled(batch):
            self.compile(state, frozen, batch)
        return self._compiled[batch["input_ids"].shape](state, frozen, batch)


def make_eval_step(graph: Any, dtype: Any) -> Callable[..., tuple[Array, Array, Array]]:
    """Compiled `(trainable, frozen, batch [batch, seq]) -> (loss sum, target tokens, correct)`."""

    @jax.jit
    def eval_step(trainable: Params, frozen: Params, batch: dict[str, Array]) -> tuple[Array, Array, Array]:
        model, lora = model_and_lora(graph, trainable, frozen, dtype)
        return loss_sums(model, lora, batch)

    return eval_step
