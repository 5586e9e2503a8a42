"""Products of matrices: summed in float32 whatever their types, and in float32 throughout."""

import contextlib
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def precise(dtype: DTypeLike) -> AbstractContextManager[object]:
    """Within it "float32" means float32, also where the hardware's default for it is coarser (TPUs, TF32).

    To be said again in what JAX calls from elsewhere, such as a backward pass.
    """
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def contract(
    a: Float[Array, "*a"], b: Float[Array, "*b"], a_axes: tuple[int, ...], b_axes: tuple[int, ...]
) -> Float[Array, "*other"]:
    """The product over these axes, summed and left in float32: the other axes of `a`, then those of `b`."""
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def precise_matmul(a: Float[Array, "*stack n k"], b: Float[Array, "*stack k m"]) -> Float[Array, "*stack n m"]:
    """A B computed in float32 throughout, also on TPUs and with TF32: for what is made once and used for ever."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def project(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*batch out"]:
    """x Wᵀ as `dtype` (default: that of x), summed in float32 where that is a 16-bit type."""
    return contract(x, weight, (x.ndim - 1,), (1,)) if dtype == jnp.float32 else _product(x, weight)


@jax.custom_vjp
def _product(x: Float[Array, "*batch in"], weight: Float[Array, "out in"]) -> Float[Array, "*batch out"]:
    """x Wᵀ rounded once, forwards and backwards.

    Asked for in float32, since for 16-bit results XLA's CPU backend has but a slow kernel, and in a
    backward pass of its own, since JAX's would multiply float32 gradients by 16-bit weights. Other
    backends round within the product.
    """
    return contract(x, weight, (x.ndim - 1,), (1,)).astype(x.dtype)


def _product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight), (x, weight)


def _product_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = kept
    rows = tuple(range(g.ndim - 1))
    d_weight = contract(g, x, rows, rows)
    return contract(g, weight, (g.ndim - 1,), (0,)).astype(x.dtype), d_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)
