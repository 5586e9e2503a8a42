"""Random weights: no checkpoint is read, and a device never holds more than its share of the model."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from phi3_jax.config.model import Phi3Config
from phi3_jax.hf.load import Shardings, platform_of, share
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.leaves import LeafPath, abstract_model, model_leaves
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.quant import Quantized, Quantizer, make_quantizer
from phi3_jax.quant.build import Leaf, build_model
from phi3_jax.quant.quantize import is_quantizable, layer_name, stack_layers


def random_model(
    config: Phi3Config,
    *,
    dtype: DTypeLike,
    quantization: str | None = None,
    double_quant: bool = True,
    attention: str = "auto",
    mesh: Mesh | None = None,
    seed: int = 0,
) -> Phi3ForCausalLM:
    """A model with matrices drawn from N(0, initializer_range²) and norms of ones, laid out as `Checkpoint` does.

    Drawn a layer at a time, so that a peak of memory measured afterwards is not that of the drawing. Layers that
    are quantised go over the host, as those of a checkpoint do, and are all alike.

    Args:
        config: The model's shape.
        dtype: Of the weights.
        quantization: `nf4`, `int8` or None.
        double_quant: Quantise the statistics of NF4 too.
        attention: The kernel.
        mesh: The devices that share the weights, None for a single one.
        seed: Of what is drawn.

    Raises:
        InputError: Where the weights cannot be quantised.
    """
    empty = abstract_model(config, dtype, attention)
    quantizer = None if quantization is None else make_quantizer(quantization, double_quant=double_quant)
    keys = {path: jax.random.fold_in(jax.random.key(seed), index) for index, path in enumerate(model_leaves(empty))}
    shardings = None if mesh is None else partial(weight_sharding, mesh=mesh)
    source = _Random(keys, config.initializer_range, jnp.dtype(dtype), quantizer, shardings)
    return build_model(empty, source, split=mesh is not None and mesh.shape["tensor"] > 1)


@dataclass(frozen=True)
class _Random:
    """Keys as the source of a model's leaves."""

    keys: Mapping[LeafPath, PRNGKeyArray]
    std: float
    dtype: jnp.dtype
    quantizer: Quantizer | None
    shardings: Shardings | None

    def quantizes(self, path: LeafPath, leaf: Leaf) -> bool:
        return self.quantizer is not None and is_quantizable(path, leaf.shape)

    def quantized(self, path: LeafPath, leaf: Leaf) -> Quantized:
        assert self.quantizer is not None
        number, *shape = leaf.shape
        # One layer's is drawn, and all are its copies: a full-size model takes more than a minute to quantise.
        drawn = np.asarray(_draw(self.keys[path], tuple(shape), self.std, self.dtype))
        platform = platform_of(self.shardings, path, leaf.shape)
        layer = self.quantizer(layer_name(path, 0), drawn).laid_out(platform)
        stacked = stack_layers(itertools.repeat(layer, number), number, path, np.empty)
        placed: Quantized = jax.device_put(stacked) if self.shardings is None else share(stacked, path, self.shardings)
        return placed

    def dense(self, path: LeafPath, leaf: Leaf, rows: slice | None = None) -> jax.Array:
        key, shape = self.keys[path], leaf.shape
        if rows is not None:
            key, shape = jax.random.fold_in(key, rows.start), (shape[0], rows.stop - rows.start, shape[2])
        where = None if self.shardings is None else self.shardings(path, shape)
        if "norm" in path[-2]:
            return jnp.ones(shape, self.dtype, device=where)
        return _draw(key, shape, self.std, self.dtype, where)


def _draw(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    std: float,
    dtype: jnp.dtype,
    where: Sharding | None = None,
) -> jax.Array:
    drawn: jax.Array = jax.jit(_normal, static_argnums=(1, 2, 3), out_shardings=where)(key, shape, std, dtype)
    return drawn


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> jax.Array:
    """Drawn in float32 and rounded; a stack layer by layer, whose float32 numbers would outweigh the model."""

    def layer(key: PRNGKeyArray) -> jax.Array:
        return (std * jax.random.normal(key, shape[-2:], jnp.float32)).astype(dtype)

    return layer(key) if len(shape) == 2 else jax.lax.map(layer, jax.random.split(key, shape[0]))
