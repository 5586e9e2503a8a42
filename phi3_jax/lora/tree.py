"""`Lora`, the pytree that holds a model's adapters."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from phi3_jax.config.lora import FrozenDict, LoraConfig
from phi3_jax.lora.adapters import DoraLinear
from phi3_jax.system.dotted import flat_items, nested


class Slice(NamedTuple):
    """Rows `start` to `stop` of the `total` that the weight of the fused module `parent` has.

    `name` is what they are called as a module: `model.layers.self_attn.q_proj`.
    """

    parent: str
    start: int
    stop: int
    total: int
    name: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """All that an adapter adds to a model.

    **Fields**: `adapters`, nested mappings that mirror the model's modules (the layer index left
    out, since layers are stacked), for example
    `{"model": {"layers": {"self_attn": {"qkv_proj": LoraLinear(...)}}}}`; `config`, the
    configuration they were made from, which saving writes down; `saved`, by module name the weights
    of `modules_to_save`, which take the place of the base's; `slices`, by module name which part of
    a fused layer an adapter is for, where it is for a part only.
    """

    adapters: dict[str, Any]
    config: LoraConfig = field(metadata={"static": True})
    saved: dict[str, Array] = field(default_factory=dict)
    slices: FrozenDict = field(default_factory=FrozenDict, metadata={"static": True})

    @classmethod
    def from_items(
        cls,
        items: Mapping[str, Any],
        config: LoraConfig,
        saved: Mapping[str, Array] | None = None,
        slices: Mapping[str, Slice] | None = None,
    ) -> "Lora":
        """The reverse of `items()`: nests adapters by the parts of their dotted names."""
        return cls(nested(items), config, dict(saved or {}), FrozenDict(slices or {}))

    def items(self) -> Iterator[tuple[str, Any]]:
        """(dotted module name, adapter) pairs: `("model.layers.mlp.down_proj", LoraLinear(...))`."""
        yield from flat_items(self.adapters)

    def materialise(self) -> dict[str, Any]:
        """The adapters as the model takes them: one for each module, the same for all its layers."""
        return _map(self.adapters, lambda adapter: adapter.materialise() if isinstance(adapter, ByLayer) else adapter)


def _map(tree: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        name: _map(value, function) if isinstance(value, Mapping) else function(value) for name, value in tree.items()
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByLayer:
    """The adapters of a stacked module whose layers differ: in rank, in scale, or by having none.

    Each part holds the layers that are alike, so that the arrays are those that train and no others.

    **Fields**: `parts`, stacked adapters of one kind; `layers`, for each part which layers it holds;
    `num_layers`, of the model.
    """

    parts: tuple[Any, ...]
    layers: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    num_layers: int = field(metadata={"static": True})

    def materialise(self) -> Any:
        """One adapter stacked over all layers: ranks padded with zeros, scales that differ moved into B."""
        rank = max(part.rank for part in self.parts)
        scales = {part.scaling for part in self.parts}
        scaling = scales.pop() if len(scales) == 1 else 1.0
        wide = [part.rescaled(scaling, rank) for part in self.parts]
        adapter = jax.tree.map(self._stacked, *wide)
        # A and B of zeros change nothing, but DoRA has a magnitude besides.
        if isinstance(adapter, DoraLinear) and sum(map(len, self.layers)) < self.num_layers:
            return SomeLayers(adapter, self._stacked(*(jnp.ones(len(layers), bool) for layers in self.layers)))
        return adapter

    def _stacked(self, *leaves: Array) -> Array:
        stack = jnp.zeros((self.num_layers, *leaves[0].shape[1:]), leaves[0].dtype)
        for leaf, layers in zip(leaves, self.layers, strict=True):
            stack = stack.at[jnp.asarray(layers)].set(leaf)
        return stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SomeLayers:
    """An adapter that counts in the layers marked `active`, and does nothing in the others."""

    adapter: Any
    active: Bool[Array, "*stack"]

    def __call__(self, y: Array, x: Array, weight: Array, key: jax.Array | None = None) -> Array:
        return jnp.where(self.active, self.adapter(y, x, weight, key), y)

    def part(self, rows: slice) -> "SomeLayers":
        return SomeLayers(self.adapter.part(rows), self.active)

    def merged(self, weight: Array) -> Array:
        return jnp.where(self.active, self.adapter.merged(weight), weight.astype(jnp.float32))

    def unmerged(self, weight: Array) -> Array:
        return jnp.where(self.active, self.adapter.unmerged(weight), weight.astype(jnp.float32))


def unstacked(adapter: Any) -> Iterator[tuple[int, Any]]:
    """(layer, that layer's adapter) of a stacked adapter, its arrays fetched to the host."""
    adapter = jax.device_get(adapter)
    if isinstance(adapter, ByLayer):
        parts = list(zip(adapter.parts, adapter.layers, strict=True))
    else:
        parts = [(adapter, tuple(range(len(jax.tree.leaves(adapter)[0]))))]
    for part, layers in parts:
        for i, layer in enumerate(layers):
            yield layer, jax.tree.map(lambda leaf, i=i: leaf[i], part)


def stacked(layers: Mapping[int, Any], num_layers: int) -> Any:
    """The reverse of `unstacked`: one stacked adapter, or `ByLayer` where the layers differ or some have none.

    **Arguments**: `layers`, by their index adapters of one layer, with arrays on the host.
    """
    groups: dict[tuple[int, float], list[int]] = {}
    for layer, adapter in sorted(layers.items()):
        groups.setdefault((adapter.rank, adapter.scaling), []).append(layer)
    parts = tuple(
        jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *(layers[layer] for layer in group))
        for group in groups.values()
    )
    if len(groups) == 1 and len(layers) == num_layers:
        return parts[0]
    return ByLayer(parts, tuple(map(tuple, groups.values())), num_layers)
