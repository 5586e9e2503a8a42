"""Names: what the base is called beside its adapters, and the known name that a misspelt one was meant to be."""

from collections.abc import Iterable

# What the model without an adapter is called, and what chooses it.
BASE, NONE = "base", "none"

# Words that end names of many kinds and so tell of none.
_VAGUE = {"type", "name", "path", "size", "kind", "mode", "config", "file", "steps", "max", "use"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was meant to be, by its letters, its abbreviated words, or as a part; None where
    none is like it, or where several are by a part.

    Example:
        >>> names = ["seed", "learning_rate", "per_device_train_batch_size"]
        >>> nearest("learnin_rate", names), nearest("learn-rate", names), nearest("foo", names)
        ('learning_rate', 'learning_rate', None)
    """
    words = _words(name)
    by_letters: list[tuple[int, str]] = []
    by_part: list[str] = []
    for other in dict.fromkeys(known):
        theirs = _words(other)
        if _is_like(words, theirs):
            by_letters.append((distance("".join(words), "".join(theirs)), other))
        elif _is_part(words, theirs):
            by_part.append(other)
    if by_letters:
        return min(by_letters)[1]
    return by_part[0] if len(by_part) == 1 else None


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """What an error says of the known name that is like `name`, in the given form; empty where none is.

    Example:
        >>> "unknown option --sed" + did_you_mean("sed", ["seed"], "--{}"), did_you_mean("foo", ["seed"])
        ('unknown option --sed; did you mean --seed?', '')
    """
    found = nearest(name, known)
    return "" if found is None else f"; did you mean {form.format(found)}?"


def distance(a: str, b: str) -> int:
    """Letters to change, add, leave out, or exchange with their neighbour, between two words.

    Example:
        >>> distance("blue", "bleu"), distance("rate", "rates")
        (1, 1)
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _words(name: str) -> list[str]:
    return [word for word in name.lower().replace("-", "_").replace(".", "_").split("_") if word]


def _is_like(words: list[str], theirs: list[str]) -> bool:
    """Whether every word is another's misspelling or abbreviation; or all letters together are, where one name has
    more words."""
    if len(words) != len(theirs):
        return _is_misspelt("".join(words), "".join(theirs))
    return all(
        word == other or _is_misspelt(word, other) or _is_short(word, other) or _is_short(other, word)
        for word, other in zip(words, theirs, strict=True)
    )


def _is_misspelt(word: str, other: str) -> bool:
    if [c for c in word if c.isdigit()] != [c for c in other if c.isdigit()]:
        return False  # beta1 is no misspelt beta2
    longest = max(len(word), len(other))
    return min(len(word), len(other)) > 2 and distance(word, other) <= (1 if longest < 7 else 2)


def _is_short(word: str, other: str) -> bool:
    return len(word) > 2 and other.startswith(word)


def _is_part(words: list[str], theirs: list[str]) -> bool:
    """Whether the words stand side by side in the other name, and say enough."""
    if set(words) <= _VAGUE or len("".join(words)) < 4:
        return False
    return any(theirs[at : at + len(words)] == words for at in range(len(theirs) - len(words) + 1))
