"""The layers over a prompt or further tokens, whose keys and values a cache keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from phi3_jax.model.attention import attend
from phi3_jax.model.cache import Cache, attend_cached, seen_keys, slot_columns, store
from phi3_jax.model.layers import Adapters, layer_weight
from phi3_jax.model.rope import rope_cos_sin

if TYPE_CHECKING:
    from phi3_jax.model.phi3 import Phi3Model

Stacks = tuple[Array, Array]  # the layers' keys and values


def cached_forward(
    model: Phi3Model,
    x: Float[Array, "batch seq hidden"],
    attention_mask: Int[Array, "batch seq"] | None,
    adapters: Adapters,
    cache: Cache,
    attention: str,
    unstacked: Sequence[tuple[Any, Adapters]] | None = None,
) -> tuple[Float[Array, "batch seq hidden"], Cache]:
    """The normed output of the last layer for further columns, and the cache with them in it.

    **Arguments**
    - `attention_mask`: into an empty cache, 0 at the padding before a row's tokens.
    - `attention`: the kernel for what goes into an empty cache, see `attention.attend`.
    - `unstacked`: each layer's weights and adapters, where `cache` has its layers unstacked, too. Not sliced out
      of stacks they are not copied for every token, as XLA does on CPUs.
    """
    config, first, seq = model.config, cache.length, x.shape[1]
    window = config.sliding_window
    columns = first + jnp.arange(seq)
    segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    starts, seen = cache.starts, None
    if cache.empty:
        segment_ids = segment_ids if attention_mask is None else (attention_mask != 0).astype(jnp.int32)
        starts = first + jnp.argmax(segment_ids, axis=1).astype(jnp.int32)
        attend_prompt = partial(attend, segment_ids=segment_ids, sliding_window=window, kind=attention)
    else:
        # A single column is stored before it is looked at; several could drive out what the first of them see.
        kept = slot_columns(first + (seq == 1), cache.capacity)
        seen = seen_keys(columns, kept if seq == 1 else jnp.concatenate([kept, columns]), starts, window)
    positions = jnp.maximum(columns - starts[:, None], 0)
    cos_sin = rope_cos_sin(config, positions, segment_ids, x.dtype)
    graph, weights = nnx.split(model.layers)

    def layer(x: Array, stacks: Stacks, index: Array | int, weights: Any, adapters: Adapters) -> tuple[Array, Stacks]:
        def attend_here(q: Array, k: Array, v: Array) -> tuple[Array, Stacks]:
            stored = store(stacks[0], index, k, first), store(stacks[1], index, v, first)
            if seen is None:
                return attend_prompt(q, k, v), stored
            if seq == 1:
                return attend_cached(q, stored[0][index], stored[1][index], seen), stored
            all_k, all_v = (
                jnp.concatenate([stack[index], new.transpose(0, 2, 1, 3)], axis=2)
                for stack, new in zip(stacks, (k, v), strict=True)
            )
            return attend_cached(q, all_k, all_v, seen), stored

        return nnx.merge(graph, weights)(x, cos_sin, attend_here, adapters)

    def scanned(carry: tuple[Array, Stacks], scanned: tuple[Array, Any, Adapters]) -> tuple[Any, None]:
        index, sliced, adapters = scanned
        own = jax.tree.map(lambda stack, own: layer_weight(stack, own, index), weights, sliced)
        return layer(*carry, index, own, adapters), None

    if unstacked is None:
        indices = jnp.arange(config.num_hidden_layers)
        carry = x, (cache.k, cache.v)
        (x, (k, v)), _ = jax.lax.scan(scanned, carry, (indices, weights, adapters.get("layers", {})))
    else:
        k, v = [], []
        for (own, adapter), *layer_stacks in zip(unstacked, cache.k, cache.v, strict=True):
            x, stored = layer(x, (layer_stacks[0][None], layer_stacks[1][None]), 0, own, adapter)
            k.append(stored[0][0])
            v.append(stored[1][0])
        k, v = tuple(k), tuple(v)
    return model.norm(x), Cache(k, v, starts, first + seq, False)
