"""Logits: what a head's adapters make of them, and the likeliest token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from phi3_jax.model.protocols import Adapters


def adapted_logits(
    logits: Float[Array, "*batch vocab"],
    x: Float[Array, "*batch hidden"],
    head: Float[Array, "vocab hidden"],
    adapters: Adapters,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "*batch vocab"]:
    """What a head's adapters make of its logits; see `Phi3ForCausalLM.head`."""
    if "embed_tokens" in adapters:
        logits = adapters["embed_tokens"].tied_logits(logits, x)
    if "lm_head" in adapters:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        logits = adapters["lm_head"](logits, x, head, key)
    return logits


def likeliest(
    logits: Float[Array, "*batch vocab"], largest: Float[Array, "*batch 1"] | None = None
) -> Int[Array, "*batch"]:
    """The token with the largest logit, of equals the first; the vocabulary's size where none is a number.

    As argmax, in two plain reductions: on CPUs argmax itself takes as long as the product with the head.

    Args:
        logits: of any number of places.
        largest: their largest, where it is known already.

    Example:
        >>> likeliest(jnp.array([[0.0, 2.0, 2.0]])).tolist()
        [1]
    """
    if largest is None:
        largest = jnp.max(logits, axis=-1, keepdims=True)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == largest, tokens, logits.shape[-1]), axis=-1)
