"""The largest singular values of a matrix, and their vectors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def whole_svd(
    matrix: Float[Array, "rows columns"], r: int
) -> tuple[Float[Array, "rows r"], Float[Array, "r"], Float[Array, "r columns"]]:
    """U, S and Vᵀ of the r largest singular values."""
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :r], s[:r], vh[:r]


def randomised_svd(
    matrix: Float[Array, "rows columns"], size: int, iterations: int, key: PRNGKeyArray
) -> tuple[Float[Array, "rows size"], Float[Array, "size"], Float[Array, "size columns"]]:
    """Nearly the same, in seconds where a whole SVD takes minutes: Halko, Martinsson and Tropp's subspace
    iteration (https://arxiv.org/abs/0909.4061), which is exact where `size` is not below a side of the matrix.

    Args:
        matrix: To be decomposed.
        size: How many values to compute, cut to the sides of the matrix; the last of them are the least exact.
        iterations: Power iterations.
        key: What the first subspace is drawn from.
    """
    size = min(size, *matrix.shape)
    q = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], size), matrix.dtype))[0]

    def iterate(_: int, q: Array) -> Array:
        return jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ q)[0])[0]

    q = jax.lax.fori_loop(0, iterations, iterate, q)
    u, s, vh = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vh
