"""Adapters of the stacked decoder layers: of layers that differ, and each layer's own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from phi3_jax.lora.adapters import STATIC, AnyAdapter, DoraLinear, LoraLinear, RankedAdapter, StackableAdapter

STACK = "model.layers."  # what the names of the modules in the stack begin with

Ranked = TypeVar("Ranked", bound=RankedAdapter)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByLayer:
    """The adapters of a stacked module whose layers differ: in rank, in scale, or by having none.

    Each part holds the layers that are alike, so that the arrays are those that train and no others.

    Attributes:
        parts: Stacked adapters of one kind.
        layers: For each part which layers it holds.
        num_layers: Of the model.
    """

    parts: tuple[StackableAdapter, ...]
    layers: tuple[tuple[int, ...], ...] = field(metadata=STATIC)
    num_layers: int = field(metadata=STATIC)

    def materialise(self) -> StackableAdapter:
        """One adapter stacked over all layers: ranks padded with zeros, scales that differ moved into B."""
        scaling, rank = common_scale(self.parts), max(part.rank for part in self.parts)
        wide = [rescaled(part, scaling, rank) for part in self.parts]
        adapter: StackableAdapter = jax.tree.map(self._spread, *wide)
        # A and B of zeros change nothing, but DoRA has a magnitude besides.
        if isinstance(adapter, DoraLinear) and sum(map(len, self.layers)) < self.num_layers:
            return replace(adapter, active=self._spread(*(jnp.ones(len(layers), bool) for layers in self.layers)))
        return adapter

    def _spread(self, *leaves: Shaped[Array, "layers *rest"]) -> Shaped[Array, "all_layers *rest"]:
        stack = jnp.zeros((self.num_layers, *leaves[0].shape[1:]), leaves[0].dtype)
        for leaf, layers in zip(leaves, self.layers, strict=True):
            stack = stack.at[jnp.asarray(layers)].set(leaf)
        return stack


ModuleAdapter: TypeAlias = AnyAdapter | ByLayer  # of a module, of all its layers if it is in the stack


def common_scale(adapters: Iterable[RankedAdapter]) -> float:
    """The scale of adapters that are to be made one: theirs, or 1 where they have several."""
    scales = {adapter.scaling for adapter in adapters}
    return scales.pop() if len(scales) == 1 else 1.0


def rescaled(adapter: Ranked, scaling: float, rank: int) -> Ranked:
    """The same update with another scale, and zeros in A and B up to another rank.

    They stay zero in training: the gradient of either is a product with the other.

    Args:
        adapter: Of any kind, with arrays on the host or on a device.
        scaling: The new scale; B (and its bias) takes the quotient.
        rank: The new rank, at least that of the adapter.
    """
    factor = 1.0 if adapter.scaling == scaling else adapter.scaling / scaling  # zero over zero included
    changed: dict[str, Any] = {}
    for entry in fields(adapter):
        value = getattr(adapter, entry.name)
        if isinstance(value, LoraLinear):
            changed[entry.name] = rescaled(value, scaling, rank)
        elif entry.name == "scaling":
            changed[entry.name] = scaling
        elif value is not None:
            axis = entry.metadata.get("rank_axis")
            value = value if axis is None else _padded(value, axis, rank)
            changed[entry.name] = value * factor if entry.metadata.get("is_scaled") else value
    return replace(adapter, **changed)


def _padded(array: Shaped[Array, "*shape"], axis: int, size: int) -> Shaped[Array, "*other"]:
    """The array with zeros up to another size of an axis."""
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def num_layers(adapter: ModuleAdapter) -> int:
    """How many layers the model of a stacked adapter has."""
    if isinstance(adapter, ByLayer):
        return adapter.num_layers
    size: int = jax.tree.leaves(adapter)[0].shape[0]
    return size


def parts_of(adapter: ModuleAdapter) -> Sequence[tuple[AnyAdapter, tuple[int, ...]]]:
    """The stacked adapters of layers that are alike, each with these layers."""
    if isinstance(adapter, ByLayer):
        return list(zip(adapter.parts, adapter.layers, strict=True))
    return [(adapter, tuple(range(num_layers(adapter))))]


def unstacked(adapter: ModuleAdapter) -> Iterator[tuple[int, AnyAdapter]]:
    """(layer, that layer's adapter) of a stacked adapter, its arrays fetched to the host."""
    for part, layers in parts_of(jax.device_get(adapter)):
        for i, layer in enumerate(layers):
            yield layer, jax.tree.map(lambda leaf, i=i: leaf[i], part)


def stacked(layers: Mapping[int, StackableAdapter], num_layers: int) -> StackableAdapter | ByLayer:
    """The reverse of `unstacked`: one stacked adapter, or `ByLayer` where the layers differ or some have none.

    Args:
        layers: By their index adapters of one layer, with arrays on the host.
        num_layers: Of the model.
    """
    groups: dict[tuple[int, float], list[int]] = {}
    for layer, adapter in sorted(layers.items()):
        groups.setdefault((adapter.rank, adapter.scaling), []).append(layer)
    parts: tuple[StackableAdapter, ...] = tuple(
        jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *(layers[layer] for layer in group))
        for group in groups.values()
    )
    if len(groups) == 1 and len(layers) == num_layers:
        return parts[0]
    return ByLayer(parts, tuple(map(tuple, groups.values())), num_layers)
