"""Random weights: no checkpoint is read, and a device never holds more than its share of the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.layout import abstract_model, model_leaves
from phi3_jax.hf.read import fused_rows, share
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import SplitWeight
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.quant import make_quantizer
from phi3_jax.quant.quantize import is_quantizable, layer_name, stack_layers


def random_model(
    config: Phi3Config,
    *,
    dtype: Any,
    quantization: str | None = None,
    double_quant: bool = True,
    attention: str = "auto",
    mesh: Mesh | None = None,
    seed: int = 0,
) -> Phi3ForCausalLM:
    """A model with matrices drawn from N(0, initializer_range²) and norms of ones, laid out as `load_model` does.

    Drawn a layer at a time, so that a peak of memory measured afterwards is not that of the drawing. Layers that
    are quantised go over the host one by one, as those of a checkpoint do.

    **Arguments**: `dtype`, of the weights; `quantization` (`nf4`, `int8` or None) and `double_quant`, as in
    `Phi3ForCausalLM.from_pretrained`; `mesh`, the devices that share the weights, None for a single one.

    Raises `InputError` where the weights cannot be quantised.
    """
    empty = abstract_model(config, dtype, attention)
    quantizer = None if quantization is None else make_quantizer(quantization, double_quant=double_quant)
    std, dtype = config.initializer_range, jnp.dtype(dtype)
    leaves = []
    for index, (path, leaf) in enumerate(model_leaves(empty).items()):
        key, shape = jax.random.fold_in(jax.random.key(seed), index), leaf.shape
        sharding = None if mesh is None else partial(weight_sharding, path, mesh=mesh)
        rows = fused_rows(empty, path) if mesh is not None and mesh.shape["tensor"] > 1 else None
        value: Any
        if quantizer is not None and is_quantizable(path, shape):
            keys = jax.random.split(key, shape[0])
            drawn = (np.asarray(_draw(k, shape[1:], std, dtype)) for k in keys)
            layers = (quantizer(layer_name(path, i), weight) for i, weight in enumerate(drawn))
            value = stack_layers(layers, shape[0], path, np.empty)
            value = jax.device_put(value) if sharding is None else share(value, sharding)
        elif "norm" in path[-2]:
            value = jnp.ones(shape, dtype, device=None if sharding is None else sharding(shape))
        elif rows is not None:
            parts = [(shape[0], part.stop - part.start, shape[2]) for part in rows]
            keys = jax.random.split(key, len(parts))
            value = SplitWeight(tuple(_draw(k, s, std, dtype, sharding) for k, s in zip(keys, parts, strict=True)))
        else:
            value = _draw(key, shape, std, dtype, sharding)
        leaves.append((path, leaf.replace(value)))
    return nnx.merge(nnx.graphdef(empty), nnx.from_flat_state(leaves))


def _draw(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    std: float,
    dtype: jnp.dtype,
    sharding: Callable[[tuple[int, ...]], Sharding] | None = None,
) -> jax.Array:
    where = None if sharding is None else sharding(shape)
    return jax.jit(_normal, static_argnums=(1, 2, 3), out_shardings=where)(key, shape, std, dtype)


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> jax.Array:
    """Drawn in float32 and rounded; a stack layer by layer, whose float32 numbers would outweigh the model."""

    def layer(key: PRNGKeyArray) -> jax.Array:
        return (std * jax.random.normal(key, shape[-2:], jnp.float32)).astype(dtype)

    return layer(key) if len(shape) == 2 else jax.lax.map(layer, jax.random.split(key, shape[0]))
