"""A base's weights as initialisers and merges see them: a layer, or its slice, at a time."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from phi3_jax.lora.adapters import AnyAdapter
from phi3_jax.lora.targets import Module
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import dense
from phi3_jax.quant import is_quantized

Tree = TypeVar("Tree", bound=PyTree)


def map_weights(
    model: Phi3ForCausalLM, module: Module, function: Callable[..., Tree], adapter: AnyAdapter | None = None
) -> Tree:
    """`function(weight)` of each layer of a module, or `function(weight, adapter)`, the results stacked.

    Args:
        model: The base.
        module: Whose weight it is; outside the layers there is but one, and nothing is stacked.
        function: Takes the weight in float32, `[out, in]`, one layer's at a time.
        adapter: Stacked over the layers of `module`, its second argument.
    """
    value = _parameter(model, module.parent).get_value()
    rows = module.rows.start, module.rows.stop
    if not module.layers:
        result: Tree = _apply(function, rows, value, adapter)
        return result
    results = [
        _apply(function, rows, _entry(value, layer), _entry(adapter, i)) for i, layer in enumerate(module.layers)
    ]
    stacked: Tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    return stacked


def weight_rows(model: Phi3ForCausalLM, name: str, rows: tuple[int, ...]) -> Float[Array, "rows in"]:
    """A float32 copy of some rows of a module outside the layers."""
    return jnp.asarray(_parameter(model, name).get_value()[jnp.asarray(rows)], jnp.float32)


def weight_shape(model: Phi3ForCausalLM, name: str) -> tuple[int, ...]:
    """`[*stack, out, in]` of a module's weight, `[*stack, size]` of a norm's."""
    return tuple(_parameter(model, name).get_value().shape)


def holds_quantized(model: Phi3ForCausalLM, name: str) -> bool:
    """Whether a module's weight is kept quantised."""
    return is_quantized(_parameter(model, name).get_value())


def saved_weight(model: Phi3ForCausalLM, name: str) -> Float[Array, "*stack out in"]:
    """A float32 copy of a module's weight, all its layers', for training it as a whole."""
    value = _parameter(model, name).get_value()
    if is_quantized(value):
        return jnp.stack([_entry(value, layer).dequantize(jnp.float32) for layer in range(value.shape[0])])
    return jnp.array(value, jnp.float32)


def _entry(tree: Tree, index: int) -> Tree:
    """What is at `index` of every array."""
    entry: Tree = jax.tree.map(lambda leaf: leaf[index], tree)
    return entry


def _parameter(model: Phi3ForCausalLM, name: str) -> nnx.Param[PyTree]:
    if name == "lm_head" and model.lm_head is None:
        name = "model.embed_tokens"
    parameter: nnx.Param[PyTree] = attrgetter(f"{name}.weight")(model)
    return parameter


# One program for each function and shape, whichever layer it is.
@partial(jax.jit, static_argnums=(0, 1))
def _apply(function: Callable[..., Tree], rows: tuple[int, int], value: PyTree, adapter: AnyAdapter | None) -> Tree:
    weight = dense(nnx.Param(value), jnp.float32, (None, None))[slice(*rows)].astype(jnp.float32)
    return function(weight) if adapter is None else function(weight, adapter)
