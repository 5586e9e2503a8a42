"""Greedy decoding, the whole sequence computed again for every token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Int

from phi3_jax.errors import InputError
from phi3_jax.lora import Lora, LoraRows
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.parallel.distributed import to_host


def generate(
    model: Phi3ForCausalLM,
    input_ids: Int[ArrayLike, "batch prompt"],
    *,
    attention_mask: Int[ArrayLike, "batch prompt"] | None = None,
    lora: Lora | LoraRows | None = None,
    max_new_tokens: int = 20,
    eos_token_id: int | tuple[int, ...] | list[int] | None = None,
    pad_token_id: int | None = None,
) -> Int[Array, "batch total"]:
    """The prompts, each followed by its most likely continuation, as transformers' greedy `generate`.

    **Arguments**
    - `input_ids`, `attention_mask`: prompts, padded on the left where they differ in length.
    - `max_new_tokens`: decoding stops after so many, or once every row has met an end token.
    - `eos_token_id`: one id or several; default: generation_config.json's, else config.json's.
    - `pad_token_id`: fills a row after its end token; default: the configuration's, else the end token.

    Raises `InputError` for a prompt that leaves no room in the model's positions, and for padding
    on the right.
    """
    input_ids = np.asarray(input_ids)  # numpy's, which on several hosts every one of them has
    prompt = input_ids.shape[1]
    if prompt == 0:
        raise InputError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if prompt + max_new_tokens > model.config.max_position_embeddings:
        raise InputError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones exceed the model's "
            f"{model.config.max_position_embeddings} positions; shorten one of them"
        )
    mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask)
    if not np.all(mask[:, -1] == 1):
        raise InputError("a prompt is padded on the right; pad on the left, so that its answer follows it")
    ends = model.config.end_token_ids if eos_token_id is None else eos_token_id
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    graph, state = nnx.split(model)
    tokens, length = to_host(_decode(graph, state, input_ids, mask, lora, max_new_tokens, ends, pad))
    return jnp.asarray(tokens[:, : int(length)])


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _decode(
    graph: Any,
    state: Any,
    input_ids: Array,
    mask: Array,
    lora: Lora | LoraRows | None,
    max_new_tokens: int,
    ends: tuple[int, ...],
    pad: int,
) -> tuple[Array, Array]:
    """All rows side by side, and how long the longest became."""
    model = nnx.merge(graph, state)
    prompt = input_ids.shape[1]
    total = prompt + max_new_tokens
    tokens = jnp.pad(input_ids, ((0, 0), (0, max_new_tokens)), constant_values=pad)
    end_ids = jnp.asarray(ends, input_ids.dtype)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        _, done, length = carry
        return (length < total) & ~jnp.all(done)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens, done, length = carry
        # What is not written yet counts as padding, so that LongRoPE sees the length in use.
        written = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=1)
        written = jnp.where(jnp.arange(total) < length, written, 0)
        logits = model(tokens, attention_mask=written, lora=lora, logits_to_keep=length[None] - 1)[:, 0]
        chosen = jnp.where(done, pad, jnp.argmax(logits, axis=-1).astype(tokens.dtype))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], length, axis=1)
        return tokens, done | jnp.isin(chosen, end_ids), length + 1

    start = tokens, jnp.zeros(tokens.shape[0], bool), jnp.asarray(prompt)
    tokens, _, length = jax.lax.while_loop(unfinished, step, start)
    return tokens, length
