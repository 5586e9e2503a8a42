"""What columns with other names than ours were probably meant to be."""

import difflib
from collections.abc import Iterable, Sequence

_TURNS = ("conversation", "dialog", "dialogue", "chat", "turns", "message_list", "conversation_history")
_PROMPTS = ("question", "query", "input", "problem", "user", "human", "prompt", "instruction", "source", "text_input")
_ANSWERS = ("answer", "response", "output", "completion", "solution", "assistant", "target", "reply", "chosen", "label")
_EXTRAS = ("context", "input")


def suggested_columns(names: Iterable[str], parts: Sequence[str]) -> dict[str, str] | None:
    """What `data.columns` would be for columns of these names; None where nothing is known of them.

    Args:
        names: The columns.
        parts: What a row can have, by the names that need no mapping.

    Example:
        >>> suggested_columns(["id", "query", "response"], ["prompt", "completion"])
        {'prompt': 'query', 'completion': 'response'}
        >>> suggested_columns(["mesages"], ["messages", "prompt"])
        {'messages': 'mesages'}
    """
    found = {name.lower().replace(" ", "_").replace("-", "_"): name for name in names}
    for name in _TURNS:
        if name in found:
            return {"messages": found[name]}
    answer = next((found[name] for name in _ANSWERS if name in found), None)
    if answer is not None and "instruction" in found:
        extra = next((found[name] for name in _EXTRAS if name in found), None)
        return _others({"instruction": found["instruction"], "input": extra, "output": answer})
    asked = next((found[name] for name in _PROMPTS if name in found and found[name] != answer), None)
    if answer is not None and asked is not None:
        return _others({"prompt": asked, "completion": answer})
    misspelt = {}
    for plain, name in found.items():
        if plain not in parts and (close := difflib.get_close_matches(plain, parts, n=1, cutoff=0.8)):
            misspelt[close[0]] = name
    return misspelt or None


def _others(said: dict[str, str | None]) -> dict[str, str]:
    return {part: name for part, name in said.items() if name is not None and name != part}
