"""Rotary position embeddings: the default kind and LongRoPE."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from phi3_jax.config.model import Phi3Config

CosSin = tuple[Float[Array, "batch seq pairs"], Float[Array, "batch seq pairs"]]


def inverse_frequencies(config: Phi3Config, factor: tuple[float, ...] | None = None) -> np.ndarray:
    """1 / (factor_i · theta^(2i/d)), float32, one for each rotated pair of dimensions."""
    dim = config.rotary_dim
    # At position 100,000 the last bit of a frequency is seen in cos, so the float32 steps are
    # transformers'; only the power is taken in float64 and rounded, since numpy's float32 power is
    # off by one bit in a fifth of the places, PyTorch's in hardly any.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = (np.float64(config.rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    if factor is not None:
        periods = np.asarray(factor, np.float32) * periods
    return np.float32(1) / periods


def length_in_use(positions: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Length of the document that each token belongs to: its largest position, plus one.

    A row without packing is one document. Padding (segment 0) counts for nothing.
    """
    seq = positions.shape[1]

    def row(positions: Array, segments: Array) -> Array:
        last = jax.ops.segment_max(positions, segments, num_segments=seq + 1)
        return last[segments] + 1

    return jax.vmap(row)(positions, segment_ids)


def rope_cos_sin(
    config: Phi3Config,
    positions: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"],
    dtype: DTypeLike,
) -> CosSin:
    """cos and sin of every rotated pair's angle, computed in float32, times the attention factor.

    LongRoPE takes its long factors where the document in use is longer than the original
    positions (4,096 tokens: short; 4,097: long), each row and each packed document by itself.
    """
    rope = config.rope
    if rope.is_longrope:
        long = length_in_use(positions, segment_ids) > rope.original_max_position_embeddings
        inv_freq = jnp.where(
            long[..., None],
            inverse_frequencies(config, rope.long_factor),
            inverse_frequencies(config, rope.short_factor),
        )  # [B, T, D/2]
    else:
        inv_freq = jnp.asarray(inverse_frequencies(config))
    angles = positions[..., None].astype(jnp.float32) * inv_freq  # [B, T, D/2]
    cos = jnp.cos(angles) * rope.attention_factor
    sin = jnp.sin(angles) * rope.attention_factor
    return cos.astype(dtype), sin.astype(dtype)


def apply_rope(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq pairs"],
    sin: Float[Array, "batch seq pairs"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the first `2 · pairs` dimensions of each head, in rotate-half layout; rounded once."""
    pairs = cos.shape[-1]
    cos, sin = (table[:, :, None].astype(jnp.float32) for table in (cos, sin))  # [B, T, 1, D/2]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)
