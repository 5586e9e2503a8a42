"""The layers over a prompt or further tokens, whose keys and values a cache keeps."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi3_jax.model.attention import attend
from phi3_jax.model.cache import Cache, attend_cached, seen_keys, slot_columns, store
from phi3_jax.model.protocols import Adapters
from phi3_jax.model.rope import rope_cos_sin
from phi3_jax.model.transformer import Phi3Model
from phi3_jax.model.walk import Layer

Stacks = tuple[Array, Array]  # the layers' keys and values


def cached_forward(
    model: Phi3Model,
    x: Float[Array, "batch seq hidden"],
    attention_mask: Int[Array, "batch seq"] | None,
    adapters: Adapters,
    cache: Cache,
    attention: str,
    unstacked: Sequence[Layer] | None = None,
) -> tuple[Float[Array, "batch seq hidden"], Cache]:
    """The normed output of the last layer for further columns, and the cache with them in it.

    Args:
        model: the model without its head.
        x: the embeddings of the further columns.
        attention_mask: into an empty cache, 0 at the padding before a row's tokens.
        adapters: those of `model`.
        cache: what was read before.
        attention: the kernel for what goes into an empty cache, see `attention.attend`.
        unstacked: the layers one by one, where `cache` is unstacked, too. Not sliced out of stacks
            they are not copied for every token, as XLA does on CPUs.
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

    def run(layer: Layer, x: Array, stacks: Stacks, index: Array | int) -> tuple[Array, Stacks]:
        def attend_here(q: Array, k: Array, v: Array) -> tuple[Array, Stacks]:
            stored = store(stacks[0], index, k, first), store(stacks[1], index, v, first)
            if seen is None:
                return attend_prompt(q, k, v), stored
            if seq == 1:
                keys, values = stored[0][index], stored[1][index]
            else:
                keys, values = _with_new(stacks[0][index], k), _with_new(stacks[1][index], v)
            return attend_cached(q, keys, values, seen), stored

        return layer(x, cos_sin, attend_here)

    def step(carry: tuple[Array, Stacks], layer: Layer) -> tuple[tuple[Array, Stacks], None]:
        assert layer.index is not None
        return run(layer, *carry, layer.index), None

    if unstacked is None:
        assert not isinstance(cache.k, tuple)
        assert not isinstance(cache.v, tuple)
        (x, (k, v)), _ = model.stack(adapters).scan(step, (x, (cache.k, cache.v)))
        return model.norm(x), Cache(k, v, starts, first + seq, False)
    all_k, all_v = [], []
    for layer, k, v in zip(unstacked, cache.k, cache.v, strict=True):
        x, (k, v) = run(layer, x, (k[None], v[None]), 0)
        all_k.append(k[0])
        all_v.append(v[0])
    return model.norm(x), Cache(tuple(all_k), tuple(all_v), starts, first + seq, False)


def _with_new(
    kept: Float[Array, "batch kv_heads capacity head_dim"], new: Float[Array, "batch seq kv_heads head_dim"]
) -> Float[Array, "batch kv_heads keys head_dim"]:
    return jnp.concatenate([kept, new.transpose(0, 2, 1, 3)], axis=2)
