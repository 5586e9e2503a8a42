"""The likeliest token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def likeliest(logits: Float[Array, "rows vocab"], largest: Float[Array, "rows 1"] | None = None) -> Int[Array, "rows"]:
    """argmax, of equal logits the first, in two plain reductions: on CPUs argmax takes as long as the product with
    the head. Where logits are not numbers it is the vocabulary's size, which is no token.

    Args:
        logits: Of the whole vocabulary.
        largest: Their maximum, where it is known already.

    Example:
        >>> likeliest(jnp.array([[0.0, 2.0, 2.0]])).tolist()
        [1]
    """
    if largest is None:
        largest = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(jnp.where(logits == largest, tokens, logits.shape[-1]), axis=-1)
