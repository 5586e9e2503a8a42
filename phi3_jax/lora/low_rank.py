"""The product that every plain adapter adds, with a backward pass of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    inner = (_dot(x, a, -1, 1) * scaling).astype(x.dtype)  # [*batch, r]
    out = y + _dot(inner, b, -1, 1).astype(y.dtype)
    return out, (x, inner, a, b, jnp.asarray(scaling, jnp.float32))


def _backward(kept: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, inner, a, b, scaling = kept
    batch = tuple(range(g.ndim - 1))
    d_b = _contract(g, inner, batch).astype(b.dtype)
    d_inner = (_dot(g, b, -1, 0) * scaling).astype(x.dtype)  # [*batch, r]
    d_a = _contract(d_inner, x, batch).astype(a.dtype)
    return g, _dot(d_inner, a, -1, 0).astype(x.dtype), d_a, d_b, None


add_low_rank.defvjp(_forward, _backward)


def _dot(x: Array, weight: Array, x_axis: int, weight_axis: int) -> Array:
    axes = (((x_axis % x.ndim,), (weight_axis,)), ((), ()))
    return jax.lax.dot_general(x, weight.astype(x.dtype), axes, preferred_element_type=jnp.float32)


def _contract(x: Array, y: Array, batch: tuple[int, ...]) -> Array:
    """xᵀ y, summed over all rows."""
    return jax.lax.dot_general(x, y, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
