"""Rotary position embeddings: the default kind and LongRoPE."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from phi3_jax.config.model import Phi3Config
from phi3_jax.model.products import contract
from phi3_jax.parallel.mesh import platform

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


@jax.named_scope("rope")
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
    """Rotates the first `2 · pairs` dimensions of each head, in rotate-half layout; rounded once.

    For TPUs in 16 bits by a product, see `rotate_by_product`, which gives the same numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> quarter = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))  # cos and sin of a right angle
        >>> apply_rope(jnp.array([[[[3.0, 5.0, 7.0]]]]), *quarter).tolist()
        [[[[-5.0, 3.0, 7.0]]]]
    """
    if platform() == "tpu" and x.dtype.itemsize == 2:
        return rotate_by_product(x, cos, sin)
    pairs = cos.shape[-1]
    cos, sin = (table[:, :, None].astype(jnp.float32) for table in (cos, sin))  # [B, T, 1, D/2]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return rotated.astype(x.dtype)


@jax.custom_vjp
def rotate_by_product(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq pairs"],
    sin: Float[Array, "batch seq pairs"],
) -> Float[Array, "batch seq heads head_dim"]:
    """`apply_rope` laid out as TPUs take it; where `x` and the tables have 16 bits the same numbers, bit for bit.

    A half of a head is no multiple of a TPU's 128 lanes, so that to cut and join halves moves whole arrays
    about. A product with a matrix of 0, 1 and -1 exchanges them exactly; heads stand before positions
    meanwhile, as the attention kernel has them. No gradient goes to the tables.

    Example:
        >>> import jax.numpy as jnp
        >>> quarter = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))  # cos and sin of a right angle
        >>> rotate_by_product(jnp.array([[[[3.0, 5.0, 7.0]]]]), *quarter).tolist()
        [[[[-5.0, 3.0, 7.0]]]]
    """
    pairs, size = cos.shape[-1], x.shape[-1]
    both = ((0, 0), (0, 0), (0, size - 2 * pairs))
    wide_cos, wide_sin = (jnp.concatenate([table, table], axis=-1).astype(jnp.float32) for table in (cos, sin))
    wide_cos = jnp.pad(wide_cos, both, constant_values=1)[:, None]  # [B, 1, T, H]
    wide_sin = jnp.pad(wide_sin, both)[:, None]
    heads = x.swapaxes(1, 2)  # [B, N, T, H]
    turned = contract(heads, jnp.asarray(_quarter_turn(pairs, size), x.dtype), (3,), (0,))
    return (heads.astype(jnp.float32) * wide_cos + turned * wide_sin).astype(x.dtype).swapaxes(1, 2)


def _quarter_turn(pairs: int, size: int) -> np.ndarray:
    """What makes (-second, first, 0) of a head's (first, second, rest), from the right."""
    turn = np.zeros((size, size), np.float32)
    first = np.arange(pairs)
    turn[first + pairs, first] = -1
    turn[first, first + pairs] = 1
    return turn


def _rotate_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return rotate_by_product(x, cos, sin), (cos, sin)


def _rotate_backward(tables: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    cos, sin = tables
    return rotate_by_product(g, cos, -sin), None, None  # turned back by the same angles


rotate_by_product.defvjp(_rotate_forward, _rotate_backward)
