"""Attention block by block, in plain JAX: memory linear in length, blocks that nobody sees skipped.

The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691). What is not in it:
the blocks that a block of queries visits are found from the documents as well as from causality and
the window, and queries may be a part of the row that starts anywhere (context parallelism).

Layout: everything is cut into blocks along the sequence, the block's number first. The heads that
share a kv head lie one after the other in the rows of a block, `R = group * block`, so that GQA is a
product with more rows and keys are never repeated.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.model.blocks import even_block
from phi3_jax.model.products import precise
from phi3_jax.model.remat import checkpoint_residual
from phi3_jax.parallel.mesh import platform

# For a key that must not be seen. Finite: a row of nothing but these is an average, not a NaN.
_HIDDEN = -1e30


def visible(
    q_segments: Int[Array, "batch seq"],
    kv_segments: Int[Array, "batch keys"],
    q_start: Int[Array, ""] | int,
    kv_start: Int[Array, ""] | int,
    sliding_window: int | None,
) -> Bool[Array, "batch seq keys"]:
    """True where the query sees the key, the first of each being at `q_start` and `kv_start` of the row.

    A key is visible iff it is not in the query's future, belongs to the same document, and lies
    within the window: `q - sliding_window < k <= q`, so `sliding_window` keys with the query's own.
    Padding (segment 0) sees only padding, so that no row of the softmax is ever empty.
    """
    query = q_start + jnp.arange(q_segments.shape[1])
    key = kv_start + jnp.arange(kv_segments.shape[1])
    distance = query[:, None] - key[None, :]
    near = distance >= 0
    if sliding_window is not None:
        near &= distance < sliding_window
    return near & (q_segments[:, :, None] == kv_segments[:, None, :])


def block_ranges(
    q_segments: Int[Array, "q_blocks batch block"],
    kv_segments: Int[Array, "kv_blocks batch kv_block"],
    q_start: Int[Array, ""] | int,
    sliding_window: int | None,
) -> tuple[Int[Array, "q_blocks"], Int[Array, "q_blocks"]]:
    """For each block of queries, the first block of keys that it visits and the one after the last.

    A block is left out where no query of it can see a key: by position, or because the documents of
    the two, taken as ranges of ids, do not overlap in any row. Ids need not be in order; where they
    are, as packing counts them, only blocks with something to see remain.
    """
    q_size, kv_size = q_segments.shape[2], kv_segments.shape[2]
    q_first = q_start + jnp.arange(q_segments.shape[0])[:, None] * q_size
    kv_first = jnp.arange(kv_segments.shape[0])[None, :] * kv_size
    some = kv_first < q_first + q_size
    if sliding_window is not None:
        some &= kv_first + kv_size > q_first - sliding_window + 1

    def extent(segments: Array) -> tuple[Array, Array, Array]:
        # Padding is 0 on either side of the documents, so it is no part of their range.
        real = segments != 0
        lowest = jnp.min(segments, axis=2, where=real, initial=jnp.iinfo(jnp.int32).max)
        highest = jnp.max(segments, axis=2, where=real, initial=jnp.iinfo(jnp.int32).min)
        return lowest, highest, ~real.all(axis=2)

    q_low, q_high, q_padding = (x[:, None] for x in extent(q_segments))
    kv_low, kv_high, kv_padding = (x[None] for x in extent(kv_segments))
    overlap = ((kv_low <= q_high) & (q_low <= kv_high)) | (q_padding & kv_padding)  # [q_blocks, kv_blocks, batch]
    some &= overlap.any(axis=2)
    first = jnp.argmax(some, axis=1)
    end = some.shape[1] - jnp.argmax(some[:, ::-1], axis=1)
    return first, jnp.where(some.any(axis=1), end, first)


class _Blocks(NamedTuple):
    """The inputs cut into blocks, and what each block of queries visits."""

    q: Float[Array, "q_blocks batch kv_heads rows head_dim"]
    k: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"]
    v: Float[Array, "kv_blocks batch kv_heads kv_block head_dim"]
    q_segments: Int[Array, "q_blocks batch block"]
    kv_segments: Int[Array, "kv_blocks batch kv_block"]
    starts: Int[Array, "q_blocks"]
    first: Int[Array, "q_blocks"]
    end: Int[Array, "q_blocks"]

    def scores(self, q: Array, q_segments: Array, start: Array, j: Array, window: int | None) -> Array:
        """[B, K, R, S] of a block of queries with the block of keys `j`, scaled and masked."""
        scores = _dot("bkrh,bksh->bkrs", q, self.k[j]) * q.shape[-1] ** -0.5
        seen = visible(q_segments, self.kv_segments[j], start, j * self.k.shape[3], window)[:, None, None]
        grouped = scores.reshape(*scores.shape[:2], -1, *seen.shape[3:])
        return jnp.where(seen, grouped, _HIDDEN).reshape(scores.shape)


def _dot(equation: str, a: Array, b: Array) -> Array:
    with precise(a.dtype):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _block_size(length: int) -> int:
    return even_block(length, 256 if platform() == "cpu" else 512)


def _cut(x: Float[Array, "batch seq heads head_dim"], size: int, kv_heads: int) -> Array:
    """[blocks, B, K, R, H]; a last block that is not full repeats the last position."""
    batch, length, heads, head_dim = x.shape
    blocks = math.ceil(length / size)
    x = jnp.pad(x, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)), mode="edge")
    x = x.reshape(batch, blocks, size, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(blocks, batch, kv_heads, -1, head_dim)


def _uncut(x: Float[Array, "blocks batch kv_heads rows head_dim"], length: int, heads: int) -> Array:
    """[B, T, N, H], the inverse of `_cut`."""
    blocks, batch, kv_heads, rows, head_dim = x.shape
    group = heads // kv_heads
    x = x.reshape(blocks, batch, kv_heads, group, rows // group, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, heads, head_dim)[:, :length]


def _fenced(*arrays: Array) -> tuple[Array, ...]:
    """On CPUs: keeps XLA from computing what lies before (or after) within the copy that cuts it into blocks,
    number by number."""
    return jax.lax.optimization_barrier(arrays) if platform() == "cpu" else arrays


def _blocks(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, q_start: Array, window: int | None
) -> _Blocks:
    size, kv_size, kv_heads = _block_size(q.shape[1]), _block_size(k.shape[1]), k.shape[2]
    q, k, v = _fenced(q, k, v)
    q, k, v = _cut(q, size, kv_heads), _cut(k, kv_size, kv_heads), _cut(v, kv_size, kv_heads)
    q_segments, kv_segments = _cut_segments(q_segments, size), _cut_segments(kv_segments, kv_size)
    starts = q_start + jnp.arange(q.shape[0]) * size
    first, end = block_ranges(q_segments, kv_segments, q_start, window)
    return _Blocks(q, k, v, q_segments, kv_segments, starts, first, end)


def _cut_segments(segments: Int[Array, "batch seq"], size: int) -> Int[Array, "blocks batch block"]:
    return _cut(segments[..., None, None], size, 1)[:, :, 0, :, 0]  # as one head of one dimension


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def flash_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    q_segments: Int[Array, "batch seq"],
    kv_segments: Int[Array, "batch keys"],
    q_start: Int[Array, ""],
    sliding_window: int | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the keys that `visible` says; softmax and sums in float32.

    Keys are the whole row's, queries those from `q_start` on. The backward pass keeps q, k, v, the
    output and the logarithm of the softmax's sum; the latter two are named `attention_out` and
    `attention_lse` for rematerialisation policies.
    """
    return _forward(q, k, v, q_segments, kv_segments, q_start, sliding_window)[0]


def _forward(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, q_start: Array, window: int | None
) -> tuple[Array, tuple[Array, ...]]:
    blocks = _blocks(q, k, v, q_segments, kv_segments, q_start, window)

    def query_block(_: None, block: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        q_block, ids, start, first, end = block

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            scores = blocks.scores(q_block, ids, start, j, window)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            part = _dot("bkrs,bksh->bkrh", weights.astype(v.dtype), blocks.v[j])
            return new_top, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + part

        zeros = jnp.zeros(q_block.shape, jnp.float32)
        start_of_sum = (jnp.full(q_block.shape[:-1], _HIDDEN, jnp.float32), zeros[..., 0], zeros)
        top, total, out = jax.lax.fori_loop(first, end, key_block, start_of_sum)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    per_block = (blocks.q, blocks.q_segments, blocks.starts, blocks.first, blocks.end)
    out, lse = jax.lax.scan(query_block, None, per_block)[1]
    out = checkpoint_residual(_uncut(out, *q.shape[1:3]), "attention_out")
    lse = checkpoint_residual(lse, "attention_lse")
    return out, (q, k, v, q_segments, kv_segments, q_start, out, lse)


def _backward(window: int | None, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, q_segments, kv_segments, q_start, out, lse = residuals
    blocks = _blocks(q, k, v, q_segments, kv_segments, q_start, window)
    size, kv_heads = blocks.q_segments.shape[2], k.shape[2]
    # Queries that fill up the last block get no gradient, and so give none.
    full = ((0, 0), (0, blocks.q.shape[0] * size - q.shape[1]), (0, 0), (0, 0))
    d_out = jnp.pad(d_out, full)
    delta = jnp.sum(jnp.pad(out, full).astype(jnp.float32) * d_out, axis=-1, keepdims=True)
    d_out, delta = _cut(d_out, size, kv_heads), _cut(delta, size, kv_heads)

    def query_block(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        q_block, ids, start, first, end, d_out_block, delta_block, lse_block = block
        # Products whose left side is contracted over its rows are slow on CPUs, so dk and dv are summed
        # transposed. Behind a barrier: where ids are constant, XLA's CPU backend unrolls the loops and folds
        # the transposes into the products, for which it then has no kernel in bfloat16.
        q_t, d_out_t = jax.lax.optimization_barrier((q_block.swapaxes(-1, -2), d_out_block.swapaxes(-1, -2)))

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            weights = jnp.exp(blocks.scores(q_block, ids, start, j, window) - lse_block[..., None])
            d_weights = _dot("bkrh,bksh->bkrs", d_out_block, blocks.v[j])
            d_scores = (weights * (d_weights - delta_block)).astype(q.dtype)
            dv = dv.at[j].add(_dot("bkhr,bkrs->bkhs", d_out_t, weights.astype(q.dtype)))
            dk = dk.at[j].add(_dot("bkhr,bkrs->bkhs", q_t, d_scores))
            return dq + _dot("bkrs,bksh->bkrh", d_scores, blocks.k[j]), dk, dv

        dq, dk, dv = jax.lax.fori_loop(first, end, key_block, (jnp.zeros(q_block.shape, jnp.float32), *sums))
        return (dk, dv), dq

    zeros = jnp.zeros_like(blocks.k, jnp.float32).swapaxes(-1, -2)
    per_block = (blocks.q, blocks.q_segments, blocks.starts, blocks.first, blocks.end, d_out, delta, lse)
    (dk, dv), dq = jax.lax.scan(query_block, (zeros, zeros), per_block)
    scale = q.shape[-1] ** -0.5
    dq = _uncut((dq * scale).astype(q.dtype), *q.shape[1:3])
    dk = _uncut((dk.swapaxes(-1, -2) * scale).astype(k.dtype), *k.shape[1:3])
    dv = _uncut(dv.swapaxes(-1, -2).astype(v.dtype), *v.shape[1:3])
    dq, dk, dv = _fenced(dq, dk, dv)
    return dq, dk, dv, None, None, None


flash_attention.defvjp(_forward, _backward)
