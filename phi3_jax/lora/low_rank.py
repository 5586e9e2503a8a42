"""The product that every plain adapter adds, with a backward pass of its own."""

from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.model.products import contract

Parts = tuple[Array, ...]
_Kept = tuple[Array, Array, Array, Parts, Array]


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
    return add_low_rank_to_parts((y,), x, a, (b,), scaling)[0]


@jax.custom_vjp
def add_low_rank_to_parts(
    parts: Parts, x: Float[Array, "*batch in"], a: Float[Array, "r in"], bs: Parts, scaling: Float[Array, ""] | float
) -> Parts:
    """`add_low_rank` to an output that lies in parts, each with its rows of B: x Aᵀ is made once.

    Example:
        >>> x, a, b = jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.array([[1.0], [2.0]])
        >>> [part.tolist() for part in add_low_rank_to_parts((jnp.zeros((1, 1)),) * 2, x, a, (b[:1], b[1:]), 0.5)]
        [[[1.5]], [[3.0]]]
    """
    return _forward(parts, x, a, bs, scaling)[0]


def _forward(parts: Parts, x: Array, a: Array, bs: Parts, scaling: Array | float) -> tuple[Parts, _Kept]:
    inner = (_times(x, a, 1) * scaling).astype(x.dtype)  # [*batch, r]
    out = tuple(y + _times(inner, b, 1).astype(y.dtype) for y, b in zip(parts, bs, strict=True))
    return out, (x, inner, a, bs, jnp.asarray(scaling, jnp.float32))


def _backward(kept: _Kept, gs: Parts) -> tuple[Parts, Array, Array, Parts, None]:
    x, inner, a, bs, scaling = kept
    batch = tuple(range(x.ndim - 1))
    d_bs = tuple(contract(g, inner, batch, batch).astype(b.dtype) for g, b in zip(gs, bs, strict=True))
    d_inner = reduce(jnp.add, (_times(g, b, 0) for g, b in zip(gs, bs, strict=True)))
    d_inner = (d_inner * scaling).astype(x.dtype)  # [*batch, r]
    d_a = contract(d_inner, x, batch, batch).astype(a.dtype)
    return gs, _times(d_inner, a, 0).astype(x.dtype), d_a, d_bs, None


add_low_rank_to_parts.defvjp(_forward, _backward)


def _times(x: Array, weight: Array, axis: int) -> Array:
    """The last axis of x with an axis of the weight, which is rounded to x's type."""
    return contract(x, weight.astype(x.dtype), (x.ndim - 1,), (axis,))
