"""Adapters that every device has for itself, so that what it adds to their gradients stays with it.

Devices that share a batch have rows or positions of their own, and the gradient of an adapter is a sum over
all of them. Differentiated as one array, it is summed between the devices wherever it comes to be: in every
layer, for every micro-batch. Here each device has a copy, by axes of the array that lie over the mesh:

     A [layers, r, in]  -->   A [layers, rows, positions, r, in]     rows over data and fsdp, positions over context
    dA [layers, r, in]  <--  dA [layers, rows, positions, r, in]     summed over the two, once a step

So a device keeps whole copies of the adapters and of the sums of their gradients while a step lasts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from phi3_jax.lora.adapters import STATIC, DoraLinear, StackableAdapter
from phi3_jax.lora.stack import STACK, ByLayer
from phi3_jax.lora.tree import Lora
from phi3_jax.model.dropout import DropKey, DropoutKey, places_of
from phi3_jax.parallel.mesh import ambient_mesh
from phi3_jax.parallel.sharding import constrain, spec

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Shares:
    """How devices share a batch.

    Attributes:
        rows: Into how many parts its rows are cut.
        positions: Into how many parts each row is cut.
        row_axes: The axes of the mesh that cut rows.
        position_axes: Those that cut positions.

    Example:
        >>> Shares.of(8, 1024).number  # without a mesh there is one device
        1
    """

    rows: int
    positions: int
    row_axes: tuple[str, ...]
    position_axes: tuple[str, ...]

    @classmethod
    def of(cls, batch: int, length: int) -> "Shares":
        """As the ambient mesh cuts a batch `[batch, length]`."""
        mesh = ambient_mesh()
        cut = spec((batch, length), ("batch", "seq"), mesh)
        row_axes, position_axes = ((part,) if isinstance(part, str) else part or () for part in cut)
        rows, positions = (prod(mesh.shape[axis] for axis in axes) for axes in (row_axes, position_axes))
        return cls(rows, positions, row_axes, position_axes)

    @property
    def number(self) -> int:
        """How many there are."""
        return self.rows * self.positions

    def spread(self, x: Shaped[Array, "layers *rest"]) -> Shaped[Array, "layers rows positions *rest"]:
        """A copy for each share, with the devices that have it."""
        x = constrain(x, *[None] * x.ndim)
        copies = jnp.broadcast_to(x[:, None, None], (x.shape[0], self.rows, self.positions, *x.shape[1:]))
        if ambient_mesh().size == 1:
            return copies
        layout = PartitionSpec(None, self.row_axes or None, self.position_axes or None)
        laid_out: Array = jax.lax.with_sharding_constraint(copies, layout)
        return laid_out

    def cut(self, x: Shaped[Array, "batch seq *rest"]) -> Shaped[Array, "rows batch positions seq *rest"]:
        """The shares of what has a batch's axes."""
        batch, length, *rest = x.shape
        return x.reshape(self.rows, batch // self.rows, self.positions, length // self.positions, *rest)

    def map(self, function: Callable[..., Tree], axes: tuple[int | None, ...], out: int) -> Callable[..., Tree]:
        """`function` for each share, on the devices that have it.

        Args:
            function: What is to be done with one.
            axes: Of each argument that the function is given for a share the axis that counts parts of positions,
                that of rows left out, which comes first; None: all shares have the same.
            out: The same of the result.
        """
        by_position = jax.vmap(function, in_axes=axes, out_axes=out, spmd_axis_name=self.position_axes or None)
        by_row = [None if axis is None else 0 for axis in axes]
        mapped: Callable[..., Tree] = jax.vmap(by_position, in_axes=by_row, spmd_axis_name=self.row_axes or None)
        return mapped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerDevice:
    """The adapter of a linear layer with a copy for each share of a batch.

    Attributes:
        adapter: Its arrays are `[*stack, rows, positions, ...]`.
        shares: Of the batches that it is for.
    """

    adapter: StackableAdapter
    shares: Shares = field(metadata=STATIC)

    @jax.named_scope("lora")
    def __call__(
        self,
        y: Float[Array, "batch seq out"],
        x: Float[Array, "batch seq in"],
        weight: Float[Array, "out in"],
        key: DropKey | None = None,
    ) -> Float[Array, "batch seq out"]:
        """As the adapter's own, each share by its copy."""
        if key is not None and not isinstance(key, DropoutKey):
            key = DropoutKey(key, places_of(x.shape[:2]))

        places = None if key is None else self.shares.cut(key.places)

        def of_share(adapter: StackableAdapter, y: Array, x: Array, places: Array | None) -> Array:
            own = None if key is None or places is None else DropoutKey(key.key, places)
            return adapter(y, x, weight, own)

        shared = self.shares.map(of_share, (0, 1, 1, 1), 1)
        return shared(self.adapter, self.shares.cut(y), self.shares.cut(x), places).reshape(y.shape)

    def part(self, rows: slice) -> "PerDevice":
        """What it adds to these rows of the output."""
        return replace(self, adapter=self.shares.map(lambda adapter: adapter.part(rows), (0,), 0)(self.adapter))


def spread(lora: Lora, shares: Shares) -> Lora:
    """The arrays of the layers' adapters with a copy for each share, in the adapter's own form.

    Example:
        >>> import phi3_jax as p3
        >>> from phi3_jax.lora.adapters import LoraLinear
        >>> adapter = LoraLinear(jnp.ones((3, 1, 4)), jnp.ones((3, 4, 1)), scaling=1.0)  # of 3 layers
        >>> lora = Lora.from_items({"model.layers.self_attn.o_proj": adapter}, p3.LoraConfig(r=1, lora_alpha=1))
        >>> copies = spread(lora, Shares(2, 1, (), ()))
        >>> [leaf.shape for leaf in jax.tree.leaves(copies)]
        [(3, 2, 1, 1, 4), (3, 2, 1, 4, 1)]
        >>> [leaf.shape for leaf in jax.tree.leaves(summed(copies))]
        [(3, 1, 4), (3, 4, 1)]
    """
    return _of_layers(lora, lambda adapter: jax.tree.map(shares.spread, adapter))


def summed(gradients: Lora) -> Lora:
    """The reverse of `spread` for gradients: the sums of all shares' own.

    Example: see `spread`.
    """
    return _of_layers(gradients, lambda adapter: jax.tree.map(lambda x: jnp.sum(x, axis=(1, 2)), adapter))


def per_device(lora: Lora, shares: Shares) -> Lora:
    """What `spread` gave, as a model takes it."""

    def ready(adapter: StackableAdapter | ByLayer) -> PerDevice:
        one = adapter.materialise() if isinstance(adapter, ByLayer) else adapter
        if isinstance(one, DoraLinear) and one.active is not None and one.active.ndim == 1:  # made just now
            one = replace(one, active=shares.spread(one.active))
        return PerDevice(one, shares)

    return _of_layers(lora, ready)


def _of_layers(lora: Lora, function: Callable[..., Any]) -> Lora:
    items = {name: function(adapter) if name.startswith(STACK) else adapter for name, adapter in lora.items()}
    return Lora.from_items(items, lora.config, lora.saved, lora.slices)
