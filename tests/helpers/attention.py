"""Attention by its definition, and inputs for it."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.model.attention import run_kind


def inputs(length, heads, kv_heads, head_dim=8, batch=2, dtype=jnp.float32):
    """q, k, v and the output's gradient."""
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def segments(*rows):
    """Rows of documents, each given as (id, length)."""
    return jnp.array([np.concatenate([np.full(n, i) for i, n in row]) for row in rows], jnp.int32)


def program(kind, window, **options):
    """From q, k, v, the output's gradient and segment ids to the output and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, d_out, ids):
        out, back = jax.vjp(lambda q, k, v: run_kind(kind, q, k, v, ids, window, **options), q, k, v)
        return out, *back(d_out)

    return run


def reference(q, k, v, d_out, ids, window):
    """The same from the definition, in NumPy and float64, with repeated keys and values."""
    group = q.shape[2] // k.shape[2]
    q, k, v, d_out = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))  # [B, N, T, H]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    ids, index = np.asarray(ids), np.arange(q.shape[2])
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance < (window or len(index))) & (ids[:, :, None] == ids[:, None])
    scale = q.shape[-1] ** -0.5
    scores = np.where(seen[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = d_out @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * scale
    shared = (weights @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ d_out)
    out, dq, dk, dv = (x.swapaxes(1, 2) for x in shared)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return out, dq, dk, dv


def assert_close(actual, expected, tolerance):
    """Differences within `tolerance` of the largest value (or of 1, where all should be 0)."""
    for ours, theirs in zip(actual, expected, strict=True):
        ours = np.asarray(ours, np.float64)
        assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1)


def packed(length):
    """Two rows: documents and padding on the right; padding on both sides and ids that return."""
    a, b = length // 3, length // 5
    return segments(
        ((1, a), (2, b), (3, length - a - 2 * b), (0, b)), ((0, b), (1, a), (7, length - a - 3 * b), (1, b), (0, b))
    )
