"""A base's weights as adapters' starts and merges see them: a layer, or its slice, at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from phi3_jax.lora.targets import Module
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import dense


def layer_weights(model: Phi3ForCausalLM, module: Module) -> Callable[..., Any]:
    """A function `(function, adapter=None)` that maps `function(weight [, adapter])` over the layers of
    `module`: weights in float32, one layer's at a time; the results are stacked.
    """
    value = _parameter(model, module.parent).get_value()
    rows = module.rows.start, module.rows.stop

    def map_layers(function: Callable[..., Any], adapter: Any = None) -> Any:
        if not module.layers:
            return _apply(function, rows, value, adapter)
        results = []
        for i, layer in enumerate(module.layers):
            one = None if adapter is None else jax.tree.map(lambda leaf, i=i: leaf[i], adapter)
            results.append(_apply(function, rows, jax.tree.map(lambda leaf, layer=layer: leaf[layer], value), one))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return map_layers


def module_weight(model: Phi3ForCausalLM, module: Module) -> Float[Array, "out in"]:
    """The weight of a module outside the layers, in float32."""
    return layer_weights(model, module)(_identity)


def weight_rows(model: Phi3ForCausalLM, name: str, rows: tuple[int, ...]) -> Float[Array, "rows in"]:
    """A float32 copy of some rows of a module outside the layers."""
    return _parameter(model, name).get_value()[jnp.asarray(rows)].astype(jnp.float32)


def weight_shape(model: Phi3ForCausalLM, name: str) -> tuple[int, ...]:
    """`[*stack, out, in]` of a module's weight, `[*stack, size]` of a norm's."""
    return tuple(_parameter(model, name).get_value().shape)


def is_quantized(model: Phi3ForCausalLM, name: str) -> bool:
    """Whether a module's weight is kept quantised."""
    return hasattr(_parameter(model, name).get_value(), "dequantize")


def saved_weight(model: Phi3ForCausalLM, name: str) -> Float[Array, "*stack out in"]:
    """A float32 copy of a module's weight, all its layers', for training it as a whole."""
    value = _parameter(model, name).get_value()
    if is_quantized(model, name):
        return jnp.stack([layer.dequantize(jnp.float32) for layer in _unstacked(value)])
    return jnp.array(value, jnp.float32)


def _unstacked(value: Any) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(value.shape[0])]


def _parameter(model: Phi3ForCausalLM, name: str) -> nnx.Param:
    module: Any = model
    if name == "lm_head" and model.lm_head is None:
        name = "model.embed_tokens"
    for part in name.split("."):
        module = getattr(module, part)
    return module.weight


def _identity(weight: Array) -> Array:
    return weight


# One program for each function and shape, whichever layer it is.
@partial(jax.jit, static_argnums=(0, 1))
def _apply(function: Callable[..., Any], rows: tuple[int, int], value: Any, adapter: Any) -> Any:
    weight = dense(nnx.Param(value), jnp.float32, (None, None))[slice(*rows)].astype(jnp.float32)
    return function(weight) if adapter is None else function(weight, adapter)
