"""What leans on the insides of JAX's binding of cuDNN's attention; a test fails when the inside changes."""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Array, Bool, Float


def masked_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch 1 seq keys"],
    *,
    is_causal: bool,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the keys of the mask, by cuDNN, which computes no gradient of the mask.

    `jax.nn.dot_product_attention` has that gradient computed for every mask and drops it: an array of the size of the
    mask, and another kernel, which writes all pairs' gradients of scores, of every head, into memory (cuDNN's frontend,
    scaled_dot_product_flash_attention.h: `use_dp_workspace`; at 8,192 positions and 32 heads 4 GiB a row).

    Its packed layout, which needs no mask, is not used: for each segment that a row may have cuDNN takes a row's whole
    length of float32 to sum the gradient of q in (`dQ_accum`, since XLA sets no `max_total_seq_len_q`; at 8,192
    positions, 32 heads of 96 and 64 segments 6 GiB a row), and only Hopper and later have it.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: true where the query sees the key.
        is_causal: whether the mask leaves out all of the future, of which cuDNN then computes nothing.
    """
    nothing = (jnp.zeros(0, q.dtype),) * 6  # lengths, offsets and pages of keys
    out: Array = cudnn._dot_product_attention(
        q,
        k,
        v,
        jax.lax.stop_gradient(cudnn.combine_bias_and_mask(None, mask, q.dtype)),
        *nothing,
        q.shape[-1] ** -0.5,
        0,  # the seed of a dropout
        0.0,  # its rate
        (True, False),  # there is a bias; its gradient is not asked for
        cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK,
        cudnn.AttentionLayout.BTNH.value,
        None,  # the window, which the mask has
        cudnn.check_cudnn_version(),
        False,  # the sums of the softmax are not asked for
    )
    return out
