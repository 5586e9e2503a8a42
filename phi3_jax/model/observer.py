"""An adapter that looks on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from jaxtyping import Array, Float

from phi3_jax.model.dropout import DropKey
from phi3_jax.model.protocols import Adapter


@dataclass(frozen=True)
class Observer:
    """In an adapter's place: tells a function what the linear layer takes and gives, and changes nothing.

    Attributes:
        report: called with the layer's input, its weight, the base's output and the adapted output, all within
            whatever transformation the model runs under.
        adapter: the layer's own adapter, None without.
    """

    report: Callable[[Array, Array, Array, Array], None]
    adapter: Adapter | None = None

    def __call__(
        self,
        y: Float[Array, "*batch out"],
        x: Float[Array, "*batch in"],
        weight: Float[Array, "out in"],
        key: DropKey | None = None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output, as the adapter makes it."""
        out = y if self.adapter is None else self.adapter(y, x, weight, key)
        self.report(x, weight, y, out)
        return out

    def part(self, rows: slice) -> Self:
        """The observer of these rows of the output alone."""
        return self if self.adapter is None else replace(self, adapter=self.adapter.part(rows))
