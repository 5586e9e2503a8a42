"""Products of matrices: summed in float32 whatever their types, and in float32 throughout."""

import contextlib
from contextlib import AbstractContextManager
from functools import partial, reduce

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_parts(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], rows: tuple[tuple[int, int], ...]
) -> tuple[Float[Array, "*batch part"], ...]:
    """x Wᵀ for these rows of the weight, which are all of them in order, each a product of its own.

    So that nothing of the size of an activation is cut or joined, in either direction. Of 16-bit numbers the
    gradient of x is rounded once for each part.

    Example:
        >>> parts = project_parts(jnp.ones((1, 2)), jnp.arange(6.0).reshape(3, 2), ((0, 1), (1, 3)))
        >>> [part.tolist() for part in parts]
        [[[1.0]], [[5.0, 9.0]]]
    """
    return tuple(_product(x, weight[slice(*part)]) for part in rows)


def _parts_forward(
    x: Array, weight: Array, rows: tuple[tuple[int, int], ...]
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    return project_parts(x, weight, rows), (x, weight)


def _parts_backward(
    rows: tuple[tuple[int, int], ...], kept: tuple[Array, Array], gs: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, weight = kept
    both = [_product_backward((x, weight[slice(*part)]), g) for part, g in zip(rows, gs, strict=True)]
    return reduce(jnp.add, (d_x for d_x, _ in both)), jnp.concatenate([d_weight for _, d_weight in both])


project_parts.defvjp(_parts_forward, _parts_backward)
