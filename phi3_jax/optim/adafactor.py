"""Adafactor as transformers' Trainer makes it: no relative steps, no scale by the parameter, no first moment.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018), algorithm 4. A
matrix's second moment is kept as the means of its rows and of its columns, whatever its size, and each layer
of a stack is a tensor of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.lora import roles

# transformers' defaults, which its Trainer leaves as they are.
DECAY_RATE, EPSILON, CLIP_THRESHOLD = -0.8, 1e-30, 1.0


class Factors(NamedTuple):
    """A matrix's second moment.

    Attributes:
        rows: Mean of each row.
        columns: Mean of each column.
    """

    rows: Float[Array, "*stack rows"]
    columns: Float[Array, "*stack columns"]


Moment = Factors | Float[Array, "*shape"]


class AdafactorState(NamedTuple):
    """What the optimizer keeps.

    Attributes:
        step: How many are done.
        nu: The second moment, a `Moment` for each parameter.
    """

    step: Int[Array, ""]
    nu: PyTree[Moment]


class _Advance(NamedTuple):
    direction: Array
    nu: Moment


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor's direction, clipped by its RMS, to be decayed and scaled by the learning rate.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_adafactor()
        >>> params = {"lora_A": jnp.ones((2, 3))}
        >>> direction, _ = tx.update({"lora_A": jnp.full((2, 3), -5.0)}, tx.init(params))
        >>> float(direction["lora_A"][0, 0])
        -1.0
    """

    def moment(path: tuple[object, ...], leaf: Array) -> Moment:
        if leaf.ndim - roles.stack_axes(path) < 2:
            return jnp.zeros(leaf.shape, jnp.float32)
        return Factors(jnp.zeros(leaf.shape[:-1], jnp.float32), jnp.zeros((*leaf.shape[:-2], leaf.shape[-1])))

    def init(params: optax.Params) -> AdafactorState:
        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(moment, params))

    def update(
        updates: optax.Updates, state: AdafactorState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdafactorState]:
        del params
        step = optax.safe_increment(state.step)
        decay = 1 - jnp.power(step.astype(jnp.float32), DECAY_RATE)

        def advance(path: tuple[object, ...], grad: Array, nu: Moment) -> _Advance:
            grad = grad.astype(jnp.float32)
            square = grad * grad + EPSILON
            if isinstance(nu, Factors):
                rows = decay * nu.rows + (1 - decay) * square.mean(-1)
                columns = decay * nu.columns + (1 - decay) * square.mean(-2)
                by_row = jax.lax.rsqrt(rows / rows.mean(-1, keepdims=True))
                direction = by_row[..., :, None] * jax.lax.rsqrt(columns)[..., None, :] * grad
                nu = Factors(rows, columns)
            else:
                nu = decay * nu + (1 - decay) * square
                direction = jax.lax.rsqrt(nu) * grad
            axes = tuple(range(roles.stack_axes(path), grad.ndim))
            rms = jnp.sqrt((direction * direction).mean(axes, keepdims=True))
            return _Advance(direction / jnp.maximum(1, rms / CLIP_THRESHOLD), nu)

        done = jax.tree_util.tree_map_with_path(advance, updates, state.nu)
        direction, nu = (
            jax.tree.map(lambda leaf, i=i: leaf[i], done, is_leaf=lambda node: isinstance(node, _Advance))
            for i in range(2)
        )
        return direction, AdafactorState(step, nu)

    return optax.GradientTransformation(init, update)
