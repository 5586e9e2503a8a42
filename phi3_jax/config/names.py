"""Names: what the base is called beside its adapters, and the known name that a misspelt one was meant to be."""

import difflib
from collections.abc import Sequence

# What the model without an adapter is called, and what chooses it.
BASE, NONE = "base", "none"

# Short forms that everybody uses for one name, and whose letters begin another's words, too (`literal_roles`).
_USUAL = {"lr": "learning_rate"}


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like `name`: letter by letter, or by initials (`lr`), or by a part (`batch_size`).

    Example:
        >>> nearest("lr", ["seed", "learning_rate"])
        'learning_rate'
    """
    if _USUAL.get(name) in known:
        return _USUAL[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    by_initials = [k for k in known if "".join(word[:1] for word in k.split("_")) == name]
    by_part = [k for k in known if len(name) > 3 and name in k]
    return next(iter([*close, *by_initials, *by_part, *difflib.get_close_matches(name, known, n=1, cutoff=0.0)]))
