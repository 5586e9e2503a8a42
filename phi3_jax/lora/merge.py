"""Base and adapter merged into one model, and separated again."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from phi3_jax.lora.adapters import AnyAdapter, TokenRows
from phi3_jax.lora.targets import slices
from phi3_jax.lora.tree import Lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.phi3 import untied
from phi3_jax.system.dotted import flat_items
from phi3_jax.system.errors import InputError


def merge_lora(model: Phi3ForCausalLM, lora: Lora) -> Phi3ForCausalLM:
    """A plain model that computes what `model` does with `lora`; `model` itself stays as it is.

    Each weight is computed in float32 and rounded once to the base's type, a layer at a time, so
    that no stack of layers is ever in memory in float32. Weights without an adapter are shared with
    `model`.

    With tied embeddings an adapter on `embed_tokens` or `lm_head` makes the two differ: the merged
    model then has an `lm_head` of its own (`tie_word_embeddings` false).

    Args:
        model: The base, unquantised.
        lora: What to merge into it.

    Raises:
        InputError: For a quantised base, for adapters that no weight can hold (`lora_bias`), and naming a weight
            that becomes NaN or infinite (PEFT's `safe_merge`, which is always on).

    Example:
        >>> import phi3_jax as p3
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> settings = p3.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        >>> lora = p3.init_lora(model, settings, jax.random.key(0))
        >>> merged, ids = p3.merge_lora(model, lora), jax.numpy.array([[1, 2, 3]])
        >>> bool(abs(merged(ids) - model(ids, lora=lora)).max() < 1e-5)
        True
    """
    return _with_weights(model, lora, _merged)


def unmerge_lora(model: Phi3ForCausalLM, lora: Lora) -> Phi3ForCausalLM:
    """Takes `lora` out of a merged model; `model` itself stays as it is.

    In float32 this gives the base back but for rounding. In bfloat16 the merged weights have lost
    what the base's last bits were: there, keep the base instead. Embeddings that merging untied
    stay untied.

    Args:
        model: What `merge_lora` gave.
        lora: What was merged into it.

    Raises:
        InputError: For what cannot be taken out again: DoRA, trained token rows, `modules_to_save`.

    Example:
        >>> import phi3_jax as p3
        >>> sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, head_dim=8)
        >>> config = p3.Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        >>> model = p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0))
        >>> settings = p3.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        >>> lora = p3.init_lora(model, settings, jax.random.key(0))
        >>> again, ids = p3.unmerge_lora(p3.merge_lora(model, lora), lora), jax.numpy.array([[1, 2, 3]])
        >>> bool(abs(again(ids) - model(ids)).max() < 1e-5)
        True
    """
    if lora.saved:
        raise InputError(f"{', '.join(lora.saved)} took the place of the base's weights; keep the base instead")
    return _with_weights(model, lora, _unmerged)


Change = Callable[[AnyAdapter, Float[Array, "out in"]], Float[Array, "out in"]]


# Named, and so the same object at every call: a jitted function knows its static arguments by that.
def _merged(adapter: AnyAdapter, weight: Array) -> Array:
    return adapter.merged(weight)


def _unmerged(adapter: AnyAdapter, weight: Array) -> Array:
    return adapter.unmerged(weight)


Parts = Mapping[str, Sequence[tuple[slice, AnyAdapter]]]


def merge_plan(model: Phi3ForCausalLM, lora: Lora) -> tuple[Phi3ForCausalLM, Parts]:
    """What merging does: the model that is changed, and by module name which adapters change which rows of it.

    Args:
        model: The base; shapes in place of arrays are enough.
        lora: What is to be merged into it.

    Returns:
        The model as it is, or with an output head of its own where embedding and head become two; with
            `modules_to_save` in place. And the adapters, those of slices under the name of their fused layer.
    """
    adapters: dict[str, AnyAdapter] = dict(flat_items(lora.materialise()))
    changes: dict[str, list[tuple[slice, AnyAdapter]]] = {}
    if model.lm_head is None and _unties(adapters):
        model = untied(model)
        # The head that it had had the trained rows, too; otherwise the table stays shared with them.
        trained = adapters.get("model.embed_tokens")
        if isinstance(trained, TokenRows):
            changes["lm_head"] = [(slice(None), trained)]
    parents = {part.name: (part.parent, part.rows) for part in slices(model)}
    for name, adapter in adapters.items():
        parent, rows = parents.get(name, (name, slice(None)))
        changes.setdefault(parent, []).append((rows, adapter))
    return model.with_saved(lora), changes


def _with_weights(model: Phi3ForCausalLM, lora: Lora, change: Change) -> Phi3ForCausalLM:
    model, changes = merge_plan(model, lora)
    graph, state = nnx.split(model)
    weights = dict(nnx.to_flat_state(state))
    for name, parts in changes.items():
        path = (*name.split("."), "weight")
        weight = weights[path].get_value()
        if not isinstance(weight, jax.Array):
            raise InputError(
                f"{name} is quantised, and a merged weight would be rounded again; merge into the unquantised base"
            )
        for rows, adapter in parts:
            weight = _changed(change, adapter, weight, rows)
        _check_finite(name, weight)
        weights[path] = weights[path].replace(weight)
    return nnx.merge(graph, nnx.from_flat_state(weights))


def _check_finite(name: str, weight: Float[Array, "*stack out in"]) -> None:
    if not isinstance(weight, jax.core.Tracer) and not jnp.isfinite(weight).all():
        raise InputError(not_finite(name, str(weight.dtype)))


def not_finite(name: str, dtype: str) -> str:
    """What is said of a merged weight that holds NaN or infinity."""
    reason = "; float16 ends at 65504, take bfloat16 or float32" if dtype == "float16" else ""
    return (
        f"{name}: the merged weight holds NaN or infinity in {dtype}, expected finite numbers; is the adapter or the "
        f"base broken?{reason}"
    )


def merged_tensor(
    parts: Sequence[tuple[slice, AnyAdapter]], weight: Float[np.ndarray, "out in"]
) -> Float[np.ndarray, "out in"]:
    """One layer's weight with its adapters, in float32; `weight` itself, in float32, is overwritten.

    Args:
        parts: The adapters of this layer, and the rows that each changes.
        weight: The base's.
    """
    for rows, adapter in parts:
        weight[rows] = _merge_float32(adapter, weight[rows])
    return weight


@jax.jit
def _merge_float32(adapter: AnyAdapter, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
    return adapter.merged(weight)


def _unties(adapters: Mapping[str, AnyAdapter]) -> bool:
    """Whether embedding and head, sharing a table so far, become two different ones."""
    return "lm_head" in adapters or not isinstance(adapters.get("model.embed_tokens"), TokenRows | None)


def _changed(
    change: Change, adapter: AnyAdapter, weight: Float[Array, "*stack out in"], rows: slice
) -> Float[Array, "*stack out in"]:
    # In a loop XLA's CPU backend makes float32 arrays of whole bfloat16 ones, to slice them and to
    # write into them; bits that pass for integers it leaves alone.
    bits = weight.view(f"uint{8 * weight.dtype.itemsize}")
    new = _change_layers(change, weight.dtype, adapter, bits[..., rows, :])
    if new.shape != bits.shape:
        new = bits.at[..., rows, :].set(new)
    changed: Array = new.view(weight.dtype)
    return changed


@partial(jax.jit, static_argnums=(0, 1))
def _change_layers(
    change: Change, dtype: jnp.dtype, adapter: AnyAdapter, bits: Shaped[Array, "*stack out in"]
) -> Shaped[Array, "*stack out in"]:
    def one(layer: tuple[AnyAdapter, Array]) -> Array:
        adapter, bits = layer
        return change(adapter, bits.view(dtype)).astype(dtype).view(bits.dtype)

    return jax.lax.map(one, (adapter, bits)) if bits.ndim == 3 else one((adapter, bits))
