"""What an array of `{"model": state, "lora": Lora}` is, told by its place in the tree.

The rules of training (what trains, decays, or learns faster) are those of PEFT and transformers, which
go by a tensor's name and by the number of its axes. Here the layers are stacked, so a tensor of theirs
is a slice of ours.
"""

from collections.abc import Iterable

from phi3_jax.system.dotted import path_names


def stack_axes(path: Iterable[object]) -> int:
    """How many leading axes count layers: 1 in the stack of decoder layers, 0 outside."""
    return int("layers" in path_names(path))


def is_embedding_adapter(path: Iterable[object]) -> bool:
    """Whether it is A or B of an adapter of the embedding, `lora_embedding_A` and `_B` in PEFT."""
    parts = path_names(path)
    return parts[-1] in ("lora_A", "lora_B") and "embed_tokens" in parts


def is_embedding_table(path: Iterable[object]) -> bool:
    """Whether it is the embedding's own weight, in the base or in an adapter's `saved`."""
    parts = path_names(path)
    return parts[-1] == "embed_tokens" or parts[-2:] == ("embed_tokens", "weight")
