"""Where every array of a run lies on the mesh, by its name and shape: the rules of `sharding`, applied.

Trees are those of training: `{"model": the model's state, "lora": Lora or None}`, and the state of a
step, whose optimizer's arrays have the names of the parameters that they belong to.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from phi3_jax.parallel.sharding import RULES, spec
from phi3_jax.system.dotted import path_names

T = TypeVar("T")

# Weights of the model by their module; norms are not cut.
KEPT: dict[str, tuple[str | None, str | None]] = {
    "embed_tokens": ("kept_heads", None),
    "lm_head": ("kept_heads", None),
    "qkv_proj": ("kept_heads", None),
    "gate_up_proj": ("kept_heads", None),
    "o_proj": ("kept", "heads"),
    "down_proj": ("kept", "heads"),
}
# Whose rows are tokens.
VOCABULARY = frozenset({"embed_tokens", "lm_head"})


def weight_sharding(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """That of a weight of the model, or of an array of a quantised one.

    Args:
        names: the parts of its dotted name, down to its module at least.
        shape: the array's.
        mesh: the devices.
    """
    axes = next((KEPT[name] for name in names if name in KEPT), None)
    stack = int("layers" in names)
    if axes is None or len(shape) != stack + 2:  # norms, and the nested statistics of a quantised weight
        return NamedSharding(mesh, PartitionSpec())
    rule = spec(shape, (*[None] * stack, *axes), mesh)
    return NamedSharding(mesh, _with_columns(rule, shape, mesh) if VOCABULARY.intersection(names) else rule)


def _with_columns(rule: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """With the columns cut by the axes that the rows do not divide by: vocabularies are of any size, widths are not."""
    rows, sizes = rule[0] or (), dict(mesh.shape)
    left = tuple(axis for axis in RULES["kept_heads"] if sizes[axis] > 1 and axis not in rows)
    if not left or shape[1] % math.prod(sizes[axis] for axis in left):
        return rule
    return PartitionSpec(rule[0], left)


def adapter_sharding(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """That of an array of an adapter between steps: cut along its longest axis."""
    axes: list[str | None] = [None] * len(shape)
    if shape:
        axes[int(np.argmax(shape))] = "kept"
    return NamedSharding(mesh, spec(shape, tuple(axes), mesh))


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """A `NamedSharding` for every array of parameters or of a step's state."""

    def leaf(path: tuple[object, ...], x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        names = path_names(path)
        if "adapters" in names:
            return adapter_sharding(x.shape, mesh)
        if names[-1] in ("step", "key", "window") or "window" in names:
            return NamedSharding(mesh, PartitionSpec())
        return weight_sharding(names, x.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_sharding(mesh: Mesh | AbstractMesh, ndim: int) -> NamedSharding:
    """That of `[..., batch, seq]`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), ("data", "fsdp"), "context"))


def place(tree: T, layout: PyTree[NamedSharding]) -> T:
    """Arrays that every process holds whole, spread over the mesh; arrays that are on it already, moved.

    PRNG keys keep their type.
    """

    def leaf(x: Array, sharding: NamedSharding) -> Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            moved: Array = jax.device_put(x, sharding)
            return moved
        if is_key(x):
            data = np.asarray(jax.random.key_data(x))
            bits = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
            keys: Array = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
            return keys
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    placed: T = jax.tree.map(leaf, tree, layout)
    return placed


def is_key(x: Array) -> bool:
    """Whether it is an array of PRNG keys, not of numbers."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
