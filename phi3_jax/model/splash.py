"""Attention on TPUs: JAX's splash attention, a Pallas kernel that skips the blocks of a known mask."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.model import blocks
from phi3_jax.model.blocks import splash_block


class _WindowMask(LocalMask):
    """The mask of a window, quick to look at: of a block that is all one value, one element.

    The kernel's making asks of every block whether any and whether all of it is visible. Written out,
    that is the square of the length, a minute's work at 131,072 positions.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True))
        nearest, farthest = queries[0] - keys[-1], queries[-1] - keys[0]
        left = self.window_size[0]
        if nearest >= 0 and (left is None or farthest <= left):
            return np.ones((1, 1), bool)
        if farthest < 0 or (left is not None and nearest > left):
            return np.zeros((1, 1), bool)
        return super().__getitem__(index)


def splash_kernel(length: int, heads: int, shards: int, sliding_window: int | None, interpret: bool = False) -> PyTree:
    """The kernel for rows of `length` whose queries are cut into `shards`: a pytree, and callable.

    Causality and the window are in its mask, and blocks outside of it are not visited. Documents come
    with the call: a block between two of them is visited, and masked.

    Args:
        length: a multiple of `SPLASH_BLOCK * shards`.
        heads: as many as one device has.
        shards: how many devices share a row's queries.
        sliding_window: how many keys a query sees, its own one included; None for all.
        interpret: run it without a TPU, slowly.
    """
    left = None if sliding_window is None else sliding_window - 1
    mask = _WindowMask((length, length), (left, 0), 0)
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(length, shards),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name="attention_out",  # on the output and on the softmax's sum
        interpret=interpret,
    )


def block_sizes(length: int, shards: int) -> BlockSizes:
    """The kernels' blocks for rows of `length` whose queries are cut into `shards`.

    Where there are few blocks of keys the backward pass is one kernel of five products in place of two of seven
    together. It writes a gradient of the queries for every block of keys, which are then summed.
    """
    q, kv = splash_block(length // shards), splash_block(length)
    product = splash_block(kv, blocks.LARGEST_SPLASH_PRODUCT)
    fused = shards == 1 and length // kv <= blocks.FUSED_SPLASH_BLOCKS
    return BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=product,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=product,
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv,
        use_fused_bwd_kernel=fused,
    )


def splash_attention(
    kernel: PyTree,
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    q_segments: Int[Array, "batch seq"],
    kv_segments: Int[Array, "batch keys"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of one device's queries to all keys of their rows, by a kernel of `splash_kernel`."""
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    by_head = (x.swapaxes(1, 2) for x in (scaled, k, v))  # [B, N, T, H], [B, K, S, H] twice
    out: Array = jax.vmap(kernel)(*by_head, SegmentIds(q_segments, kv_segments))
    return out.swapaxes(1, 2)
