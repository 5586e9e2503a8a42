"""The product that every plain adapter adds, with a backward pass of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.model.products import contract


@jax.custom_vjp
def add_low_rank(
    y: Float[Array, "*batch out"],
    x: Float[Array, "*batch in"],
    a: Float[Array, "r in"],
    b: Float[Array, "out r"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, "*batch out"]:
    """y + s · x Aᵀ Bᵀ, as y's type.

    The products take A and B rounded to x's type, as PyTorch's autocast does for PEFT, and sum in
    float32. So activations are read and written once, in their own type; A's and B's gradients leave
    the products in float32, not rounded to x's type as differentiating the rounding would have them.
    No gradient goes to `scaling`.
    """
    return _forward(y, x, a, b, scaling)[0]


def _forward(y: Array, x: Array, a: Array, b: Array, scaling: Array | float) -> tuple[Array, tuple[Array, ...]]:
    inner = (_times(x, a, 1) * scaling).astype(x.dtype)  # [*batch, r]
    out = y + _times(inner, b, 1).astype(y.dtype)
    return out, (x, inner, a, b, jnp.asarray(scaling, jnp.float32))


def _backward(kept: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, inner, a, b, scaling = kept
    batch = tuple(range(g.ndim - 1))
    d_b = contract(g, inner, batch, batch).astype(b.dtype)
    d_inner = (_times(g, b, 0) * scaling).astype(x.dtype)  # [*batch, r]
    d_a = contract(d_inner, x, batch, batch).astype(a.dtype)
    return g, _times(d_inner, a, 0).astype(x.dtype), d_a, d_b, None


add_low_rank.defvjp(_forward, _backward)


def _times(x: Array, weight: Array, axis: int) -> Array:
    """The last axis of x with an axis of the weight, which is rounded to x's type."""
    return contract(x, weight.astype(x.dtype), (x.ndim - 1,), (axis,))
