"""The documents of packed rows: which one a token belongs to, where it stands in it, and how long it is.

Segment ids count the documents of a row from 1 and are 0 at padding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from phi3_jax.data.batch import Batch
from phi3_jax.system.errors import InputError


def documents(batch: Batch) -> Int[Array, "batch seq"]:
    """Which document of its row each token belongs to: the batch's segment ids, or else its attention mask.

    Raises:
        InputError: for a batch without `input_ids`.
    """
    if "input_ids" not in batch:
        raise InputError(f"a batch has {', '.join(sorted(batch)) or 'no entries'}, expected at least input_ids")
    for name in ("segment_ids", "attention_mask"):
        if batch.get(name) is not None:
            return jnp.asarray(batch[name])
    return jnp.ones_like(jnp.asarray(batch["input_ids"]))


def default_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Positions that restart at the first token of every document; 0 up to a row's first token."""
    index = jnp.arange(segment_ids.shape[1])
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def token_counts(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """How many tokens of its row have a token's id, in memory that grows with the length alone."""

    def of_row(ids: Int[Array, "seq"]) -> Int[Array, "seq"]:
        ordered = jnp.sort(ids)
        return jnp.searchsorted(ordered, ids, side="right") - jnp.searchsorted(ordered, ids, side="left")

    return jax.vmap(of_row)(segment_ids)
