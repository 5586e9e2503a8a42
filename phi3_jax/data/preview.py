"""Tokenised rows for people: as the model sees them, with the targets marked."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from phi3_jax.data.rows import TokenizedRows
from phi3_jax.data.tokenizer import Tokenizer


def preview(rows: TokenizedRows, tokenizer: Tokenizer, index: int = 0, *, tokens: int = 200) -> str:
    """The first `tokens` of a row as the model sees them, special tokens included, on one line.

    Targets stand between ⟦ and ⟧, a backslash before letters that only look like a special token, and a dot for
    what is not printable, which may steer a terminal.
    """
    ids, mask = (part[:tokens].tolist() for part in rows[index])
    shown = mark(_runs(tokenizer, ids, mask))
    return shown if len(rows[index][0]) <= tokens else f"{shown} …"


def runs(rows: TokenizedRows, tokenizer: Tokenizer, index: int, *, tokens: int) -> Iterator[tuple[bool, str]]:
    """A row as `preview` shows it, cut where targets begin and end: whether they are targets, and their text.

    Of stretches of more than `tokens` the middle is left out, so that of every target something is seen.
    """
    ids, mask = (part.tolist() for part in rows[index])
    for is_target, start, end in _stretches(mask):
        if end - start <= tokens:
            yield is_target, _decoded(tokenizer, ids[start:end])
            continue
        head, tail = ids[start : start + tokens // 2], ids[end - tokens // 2 : end]
        left_out = end - start - len(head) - len(tail)
        yield is_target, f"{_decoded(tokenizer, head)} … {left_out:,} tokens … {_decoded(tokenizer, tail)}"


def mark(parts: Iterator[tuple[bool, str]]) -> str:
    """The text of runs, targets between ⟦ and ⟧.

    Example:
        >>> mark(iter([(False, "<|user|>2 + 2?<|end|><|assistant|>"), (True, "4<|end|>")]))
        '<|user|>2 + 2?<|end|><|assistant|>⟦4<|end|>⟧'
    """
    return "".join(f"⟦{text}⟧" if is_target else text for is_target, text in parts)


def _runs(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Iterator[tuple[bool, str]]:
    for is_target, start, end in _stretches(mask):
        yield is_target, _decoded(tokenizer, ids[start:end])


def _stretches(mask: Sequence[int]) -> Iterator[tuple[bool, int, int]]:
    """Where the mask is the same: what it is, from, up to."""
    start = 0
    for end in range(1, len(mask) + 1):
        if end == len(mask) or mask[end] != mask[start]:
            yield bool(mask[start]), start, end
            start = end


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = _escaped(tokenizer, ids)
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def _escaped(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text, with a backslash before letters that only look like a special token."""
    tokens = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if all(text.count(content) == ids.count(number) for number, content in tokens.items()):
        return text
    similar = re.compile("|".join(map(re.escape, tokens.values())))
    pieces = []
    for is_token, group in groupby(ids, key=tokens.__contains__):
        piece = tokenizer.decode(list(group), skip_special_tokens=False)
        pieces.append(piece if is_token else similar.sub(r"\\\g<0>", piece))
    return "".join(pieces)
