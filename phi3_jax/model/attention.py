"""Who sees whom, and scaled dot-product attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(segment_ids: Int[Array, "batch seq"], sliding_window: int | None) -> Bool[Array, "batch 1 seq seq"]:
    """True where the query (row) sees the key (column).

    A key is visible iff it is not in the query's future, belongs to the same document, and lies
    within the window: `q - sliding_window < k <= q`, so `sliding_window` keys with the query's own.
    Padding (segment 0) sees only padding, so that no row of the softmax is ever empty.
    """
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]  # [T, S]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, S]
    return (visible & same)[:, None]


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "batch 1 seq seq"],
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v; scores and softmax in float32, each kv head shared by its group."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
