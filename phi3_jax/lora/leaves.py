"""What an array of `{"model": state, "lora": Lora}` is, told by its place in the tree.

The rules of training (what trains, decays, or learns faster) are those of PEFT and transformers, which
go by a tensor's name and by the number of its axes. Here the layers are stacked, so a tensor of theirs
is a slice of ours.
"""

from typing import Any


def names(path: Any) -> tuple[str, ...]:
    """The parts of a leaf's path: `("lora", "adapters", "model", "layers", …, "qkv_proj", "lora_A")`.

    Keys that are dotted names themselves are parted too; the `value` of a variable is left out.
    """
    # jax.tree_util.keystr(simple=True), without the text in between.
    keys = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    parts = tuple(part for key in keys for part in str(key).split("."))
    return parts[:-1] if parts[-1] == "value" else parts


def stack_axes(path: Any) -> int:
    """How many leading axes count layers: 1 in the stack of decoder layers, 0 outside."""
    return int("layers" in names(path))


def is_embedding_adapter(path: Any) -> bool:
    """Whether it is A or B of an adapter of the embedding, `lora_embedding_A` and `_B` in PEFT."""
    parts = names(path)
    return parts[-1] in ("lora_A", "lora_B") and "embed_tokens" in parts


def is_embedding_table(path: Any) -> bool:
    """Whether it is the embedding's own weight, in the base or in an adapter's `saved`."""
    parts = names(path)
    return parts[-1] == "embed_tokens" or parts[-2:] == ("embed_tokens", "weight")
