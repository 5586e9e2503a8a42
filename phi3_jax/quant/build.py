"""A model made leaf by leaf: each quantised, split into the parts of a fused layer, or whole.

Where the values come from is the source's matter: a checkpoint's files, a key, another model, or shapes alone.
"""

from typing import Any, Protocol

import jax
from flax import nnx

from phi3_jax.model.layers import SplitWeight
from phi3_jax.model.leaves import LeafPath, fused_rows, model_leaves
from phi3_jax.model.phi3 import Phi3ForCausalLM
from phi3_jax.quant.base import Quantized

Leaf = nnx.Variable[Any]  # of a model's state
LeafValue = jax.Array | Quantized | SplitWeight  # what it holds; shapes in place of arrays where the model is abstract


class LeafSource(Protocol):
    """Where the values of a model's leaves come from."""

    def quantizes(self, path: LeafPath, leaf: Leaf) -> bool:
        """Whether the leaf is to be quantised."""
        ...

    def quantized(self, path: LeafPath, leaf: Leaf) -> Quantized:
        """The weights of all layers, quantised, where they are to lie."""
        ...

    def dense(self, path: LeafPath, leaf: Leaf, rows: slice | None = None) -> jax.Array:
        """The leaf as an array, or of each layer's matrix these rows alone, where it is to lie."""
        ...


def build_model(empty: Phi3ForCausalLM, source: LeafSource, *, split: bool = False) -> Phi3ForCausalLM:
    """The model of the structure of `empty`, whose every leaf comes from the source, one after the other.

    Args:
        empty: A model; of its leaves only the shapes count, and what the source makes of them.
        source: Gives the values.
        split: Hold fused weights in their parts, for devices to share the rows of each.
    """
    leaves = []
    for path, leaf in model_leaves(empty).items():
        rows = fused_rows(empty, path) if split else None
        value: LeafValue
        if source.quantizes(path, leaf):
            value = source.quantized(path, leaf)
        elif rows is not None:
            value = SplitWeight(tuple(source.dense(path, leaf, part) for part in rows))
        else:
            value = source.dense(path, leaf)
        leaves.append((path, leaf.replace(value)))
    model: Phi3ForCausalLM = nnx.merge(nnx.graphdef(empty), nnx.from_flat_state(leaves))
    return model
