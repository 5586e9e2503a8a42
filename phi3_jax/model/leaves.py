"""A model's leaves: with shapes in place of arrays, by path, and the rows of those that are fused."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from phi3_jax.config.model import Phi3Config
from phi3_jax.model.layers import FusedLinear
from phi3_jax.model.phi3 import Phi3ForCausalLM

LeafPath = tuple[str, ...]  # ("model", "layers", "mlp", "down_proj", "weight")


def abstract_model(config: Phi3Config, dtype: DTypeLike = jnp.float32, attention: str = "auto") -> Phi3ForCausalLM:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0), attention=attention))


def model_leaves(model: Phi3ForCausalLM) -> dict[LeafPath, nnx.Variable[PyTree]]:
    """The variables of a model's state, by path."""
    return {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def shape_of(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """A shape in place of an array, typed as one: what `jax.eval_shape` makes."""
    abstract: Array = jax.eval_shape(lambda: jnp.zeros(shape, dtype))
    return abstract


def fused_rows(model: Phi3ForCausalLM, path: LeafPath) -> list[slice] | None:
    """The rows of each part of the weight at `path`, None where it is not a fused one."""
    module = functools.reduce(getattr, path[:-1], model)
    return list(module.rows.values()) if isinstance(module, FusedLinear) else None
