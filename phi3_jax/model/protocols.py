"""What a model knows of adapters and of quantised weights: what they can do, not what they are."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from phi3_jax.model.dropout import DropKey

# Module name -> its adapter, or the Adapters of a submodule. Of stacked layers one entry, its arrays stacked.
Adapters = Mapping[str, Any]
State = nnx.State[str, PyTree]  # of a module: its weights, nested by name


class Adapter(Protocol):
    """What a linear layer takes beside its weight; the kinds are in `phi3_jax.lora.adapters`."""

    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"],
        key: DropKey | None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output, given the base's output `y` for the input `x`; dropout iff `key`."""
        ...

    def part(self, rows: slice) -> Self:
        """The adapter of these rows of the output alone."""
        ...


@runtime_checkable
class PartsAdapter(Protocol):
    """An adapter that does once what all parts of an output have in common."""

    def on_parts(
        self, parts: list[Array], x: Float[Array, "*batch in"], rows: list[slice], key: DropKey | None
    ) -> list[Array]:
        """The layer's output in parts, given the base's, each of these rows of the weight."""
        ...


class EmbeddingAdapter(Protocol):
    """What an embedding takes beside its table."""

    def __call__(
        self,
        rows: Float[Array, "batch seq hidden"],
        ids: Int[Array, "batch seq"],
        table: Float[Array, "vocab hidden"],
        padding_idx: int | None,
    ) -> Float[Array, "batch seq hidden"]:
        """The adapted rows, given the table's `rows` for `ids`."""
        ...

    def tied_logits(
        self, logits: Float[Array, "batch seq vocab"], x: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq vocab"]:
        """The logits for `x` of an output head that shares the table, given those of the base."""
        ...


class AdapterSet(Protocol):
    """What a whole model takes beside its weights; the kinds are in `phi3_jax.lora`. A pytree."""

    @property
    def saved(self) -> Mapping[str, Array]:
        """The weights that it replaces as a whole, by dotted name of their module."""
        ...

    def materialise(self) -> Adapters:
        """Its adapters, nested as the model's modules are, made of its arrays."""
        ...


class QuantizedWeight(Protocol):
    """What a linear layer may hold in place of its weight; the kinds are in `phi3_jax.quant`.

    A pytree, whose arrays have the same leading axes as the stack of layers it belongs to.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for, `[*stack, out, in]`."""
        ...

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "out in"]:
        """The weight of a single layer, rounded to `dtype`."""
        ...


def materialised(lora: AdapterSet | None, *path: str) -> Adapters:
    """The adapters of the module at `path`, such as `"model", "layers"`; none where there is no `lora`."""
    adapters: Adapters = {} if lora is None else lora.materialise()
    for name in path:
        adapters = adapters.get(name, {})
    return adapters
