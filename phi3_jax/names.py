"""Names: the known one that a misspelt one was meant to be, and those of a tree's leaves."""

import difflib
from collections.abc import Sequence
from typing import Any


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`: letter by letter, or by initials (`lr`), or by a part (`batch_size`)."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    by_initials = [k for k in known if "".join(word[:1] for word in k.split("_")) == name]
    by_part = [k for k in known if len(name) > 3 and name in k]
    return next(iter([*close, *by_initials, *by_part, *difflib.get_close_matches(name, known, n=1, cutoff=0.0)]))


def path_names(path: Any) -> tuple[str, ...]:
    """The parts of a leaf's path: `("lora", "adapters", "model", "layers", …, "qkv_proj", "lora_A")`.

    Keys that are dotted names themselves are parted too; the `value` of a variable is left out.
    """
    # jax.tree_util.keystr(simple=True), without the text in between.
    keys = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    parts = tuple(part for key in keys for part in str(key).split("."))
    return parts[:-1] if parts[-1] == "value" else parts
