"""`Lora`, the pytree that holds a model's adapters."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import jax
from jaxtyping import Array, Float

from phi3_jax.config.lora import FrozenDict, LoraConfig
from phi3_jax.lora.adapters import STATIC
from phi3_jax.lora.stack import ByLayer, ModuleAdapter
from phi3_jax.model.protocols import Adapters
from phi3_jax.system.dotted import Nested, flat_items, last_part, nested
from phi3_jax.system.errors import InputError


class Slice(NamedTuple):
    """Rows of a fused module that have a name of their own.

    Attributes:
        parent: The fused module.
        start: The first row.
        stop: The row after the last.
        total: How many rows the weight of `parent` has.
        name: What the rows are called as a module: `model.layers.self_attn.q_proj`.
    """

    parent: str
    start: int
    stop: int
    total: int
    name: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """All that an adapter adds to a model: a pytree, to be handed to the model's call and differentiated.

    Attributes:
        adapters: Nested mappings that mirror the model's modules, the layer index left out since layers are
            stacked: `{"model": {"layers": {"self_attn": {"qkv_proj": LoraLinear(...)}}}}`.
        config: What they were made from, which saving writes down.
        saved: By module name the weights of `modules_to_save`, which take the place of the base's.
        slices: By module name which part of a fused layer an adapter is for, where it is for a part only.

    Example:
        >>> import jax.numpy as jnp
        >>> from phi3_jax.lora import LoraLinear
        >>> adapter = LoraLinear(jnp.zeros((2, 1, 16)), jnp.zeros((2, 16, 1)), scaling=2.0)  # of 2 layers
        >>> lora = Lora.from_items({"model.layers.self_attn.o_proj": adapter}, LoraConfig(r=1, lora_alpha=2))
        >>> lora.adapters["model"]["layers"]["self_attn"]["o_proj"] is adapter
        True
        >>> [leaf.shape for leaf in jax.tree.leaves(lora)]
        [(2, 1, 16), (2, 16, 1)]
    """

    adapters: Nested[ModuleAdapter]
    config: LoraConfig = field(metadata=STATIC)
    saved: dict[str, Float[Array, "*stack out in"]] = field(default_factory=dict)
    slices: FrozenDict[Slice] = field(default_factory=FrozenDict, metadata=STATIC)

    @classmethod
    def from_items(
        cls,
        items: Mapping[str, ModuleAdapter],
        config: LoraConfig,
        saved: Mapping[str, Array] | None = None,
        slices: Mapping[str, Slice] | None = None,
    ) -> "Lora":
        """The reverse of `items()`: nests adapters by the parts of their dotted names.

        Args:
            items: Dotted module name -> adapter.
            config: See the attributes, as for the others.
            saved: None: nothing.
            slices: None: every adapter is for a whole module.
        """
        return cls(nested(items), config, dict(saved or {}), FrozenDict(slices or {}))

    def items(self) -> Iterator[tuple[str, ModuleAdapter]]:
        """(dotted module name, adapter) pairs: `("model.layers.mlp.down_proj", LoraLinear(...))`."""
        found: Iterator[tuple[str, ModuleAdapter]] = flat_items(self.adapters)
        return found

    def materialise(self) -> Adapters:
        """The adapters as the model takes them: one for each module, the same for all its layers."""
        return nested({name: a.materialise() if isinstance(a, ByLayer) else a for name, a in self.items()})

    @property
    def differs_by_layer(self) -> bool:
        """Whether the model is given arrays that are made of those which train."""
        return any(isinstance(adapter, ByLayer) for _, adapter in self.items())


def refuse_saved(lora: Lora, where: str) -> None:
    """Refuses an adapter with whole weights, which have no place `where`.

    Raises:
        InputError: For `modules_to_save`.
    """
    if lora.saved:
        raise InputError(
            f"modules_to_save has {', '.join(lora.saved)}, whole weights, which are not supported {where}; "
            "leave that adapter out"
        )


def refuse_shapes(name: str, shapes: Iterable[tuple[int, ...]]) -> NoReturn:
    """Refuses adapters of one module that are for weights of these shapes.

    Raises:
        InputError: Always.
    """
    found = " and ".join(map(str, sorted(shapes)))
    raise InputError(f"the adapters of {last_part(name)} are for weights of {found}; give adapters of one base")
