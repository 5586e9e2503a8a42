"""Base and adapter made one model, and parted again."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from phi3_jax.lora.adapters import Lora
from phi3_jax.model import Phi3ForCausalLM


def merge_lora(model: Phi3ForCausalLM, lora: Lora) -> Phi3ForCausalLM:
    """A plain model that computes what `model` does with `lora`; `model` itself stays as it is.

    Each weight is computed in float32 and rounded once to the base's type, a layer at a time, so
    that no stack of layers is ever in memory in float32. Weights without an adapter are shared with
    `model`.

    With tied embeddings an adapter on `embed_tokens` or `lm_head` makes the two differ: the merged
    model then has an `lm_head` of its own (`tie_word_embeddings` false).
    """
    return _with_weights(model, lora, _merged)


def unmerge_lora(model: Phi3ForCausalLM, lora: Lora) -> Phi3ForCausalLM:
    """Takes `lora` out of a merged model; `model` itself stays as it is.

    In float32 this gives the base back but for rounding. In bfloat16 the merged weights have lost
    what the base's last bits were: there, keep the base instead. Embeddings that merging untied
    stay untied.
    """
    return _with_weights(model, lora, _unmerged)


# Named, and so the same object at every call: a jitted function knows its static arguments by that.
def _merged(adapter: Any, weight: Array) -> Array:
    return adapter.merged(weight)


def _unmerged(adapter: Any, weight: Array) -> Array:
    return adapter.unmerged(weight)


def _with_weights(model: Phi3ForCausalLM, lora: Lora, change: Callable[[Any, Array], Array]) -> Phi3ForCausalLM:
    adapters = dict(lora.items())
    graph, state = nnx.split(model)
    weights = dict(nnx.to_flat_state(state))
    if model.lm_head is None and adapters.keys() & {"lm_head", "model.embed_tokens"}:
        graph = _untied_graph(model)
        weights[("lm_head", "weight")] = weights[("model", "embed_tokens", "weight")]
    for name, adapter in adapters.items():
        path = (*name.split("."), "weight")
        weights[path] = weights[path].replace(_changed(change, adapter, weights[path][...]))
    return nnx.merge(graph, nnx.from_flat_state(weights))


def _changed(
    change: Callable[[Any, Array], Array], adapter: Any, weight: Float[Array, "*stack out in"]
) -> Float[Array, "*stack out in"]:
    # In a loop XLA's CPU backend makes float32 arrays of whole bfloat16 ones, to slice them and to
    # write into them; bits that pass for integers it leaves alone.
    bits = weight.view(f"uint{8 * weight.dtype.itemsize}")
    return _change_layers(change, weight.dtype, adapter, bits).view(weight.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _change_layers(
    change: Callable[[Any, Array], Array], dtype: jnp.dtype, adapter: Any, bits: Shaped[Array, "*stack out in"]
) -> Shaped[Array, "*stack out in"]:
    def one(layer: tuple[Any, Array]) -> Array:
        adapter, bits = layer
        return change(adapter, bits.view(dtype)).astype(dtype).view(bits.dtype)

    return jax.lax.map(one, (adapter, bits)) if bits.ndim == 3 else one((adapter, bits))


def _untied_graph(model: Phi3ForCausalLM) -> Any:
    config = replace(model.config, tie_word_embeddings=False)
    abstract = nnx.eval_shape(lambda: type(model)(config, dtype=model.dtype, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]
