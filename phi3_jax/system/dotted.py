"""Dotted names: `model.layers.mlp.down_proj`, of modules, of nested mappings' entries and of a tree's leaves."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar, Union

T = TypeVar("T")

Nested: TypeAlias = Mapping[str, Union[T, "Nested[T]"]]


def dotted(path: Iterable[object]) -> str:
    """The name of a path: `("model", "layers", 3)` is `"model.layers.3"`."""
    return ".".join(map(str, path))


def last_part(name: str) -> str:
    """What follows the last dot of a name, or all of it."""
    return name.rpartition(".")[2]


def sibling(name: str, other: str) -> str:
    """The last part of `other` in the place of that of `name`."""
    return f"{name.rpartition('.')[0]}.{last_part(other)}"


def nested(items: Mapping[str, T]) -> dict[str, T | Nested[T]]:
    """Mappings of mappings, by the parts of dotted names.

    Example:
        >>> nested({"mlp.up": 1, "mlp.down": 2})
        {'mlp': {'up': 1, 'down': 2}}
    """
    groups: dict[str, dict[str, T]] = {}
    for name, value in items.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = value
    return {head: own[""] if "" in own else nested(own) for head, own in groups.items()}


def flat_items(tree: Nested[T], prefix: str = "") -> Iterator[tuple[str, T]]:
    """The reverse of `nested`: (dotted name, value) pairs."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def path_names(path: Iterable[object]) -> tuple[str, ...]:
    """The parts of a leaf's path: `("lora", "adapters", "model", "layers", …, "qkv_proj", "lora_A")`.

    Keys that are dotted names themselves are split too; the `value` of a variable is left out.

    Args:
        path: As `jax.tree_util` hands it out (a `KeyPath`), or the names themselves.
    """
    # jax.tree_util.keystr(simple=True), without loading JAX.
    keys = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    parts = tuple(dotted(keys).split("."))
    return parts[:-1] if parts[-1] == "value" else parts
