"""The one table of what lies where: weights, adapters, optimizer state, activations, batches.

Weights are cut by rows over `fsdp` and `context` together, so that a device reads one run of bytes of
a file, and gathered a layer at a time when that layer is at work. Over `tensor` they stay cut: the
rows of what makes heads and hidden units, the columns of what takes them in, so that a layer needs
one sum over `tensor` after attention and one after the MLP, in each direction.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from phi3_jax.parallel.mesh import ambient_mesh
from phi3_jax.system.errors import InputError

# Logical axis -> mesh axes.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    "heads": ("tensor",),  # heads, hidden units of the MLP, and the vocabulary
    # Weights where they are kept: rows that make heads, and other rows.
    "kept_heads": ("tensor", "fsdp", "context"),
    "kept": ("fsdp", "context"),
}


def check_tensor_axis(tensor: int, sizes: Mapping[str, int]) -> None:
    """Raises `InputError` where `tensor` devices cannot share one of `sizes` evenly: what is counted, and how many."""
    for what, size in sizes.items():
        if size % tensor:
            raise InputError(f"parallel.tensor is {tensor}, which does not divide {size} {what}; give a divisor")


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes for an array with these logical axes, None where nothing is cut.

    Where a size does not divide by all of its mesh axes, the last ones are left out.
    """
    sizes = dict(mesh.shape)
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        names = [name for name in RULES[axis] if sizes[name] > 1] if axis else []
        while names and size % math.prod(sizes[name] for name in names):
            names.pop()
        parts.append(tuple(names) or None)
    return PartitionSpec(*parts)


def constrain(x: Array, *axes: str | None) -> Array:
    """`x` laid out over the ambient mesh by its logical axes; as it is where that is of one device."""
    mesh = ambient_mesh()
    return x if mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of it on every device."""
    return NamedSharding(mesh, PartitionSpec())
