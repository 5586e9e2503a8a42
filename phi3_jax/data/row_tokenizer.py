"""Rows of any source, one after the other, to tokens and targets; what became of them is counted."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer, Encoded, Rendered
from phi3_jax.data.formats import Conversation, Prerendered, read_row
from phi3_jax.data.rows import DataStats
from phi3_jax.data.sources import Source
from phi3_jax.system.errors import InputError

# Rows and characters tokenised in one call: enough to keep every core busy, little memory.
_CHUNK, _CHUNK_TEXT = 1000, 2**23


@dataclass(frozen=True)
class Row:
    """A row of a source, read when asked for.

    Attributes:
        source: Where it is from.
        index: Its number there, from 0.
    """

    source: Source
    index: int

    @property
    def where(self) -> str:
        """Its name in messages."""
        return self.source.where(self.index)

    @property
    def columns(self) -> Mapping[str, object]:
        """What it holds."""
        return self.source.rows[self.index]


@dataclass(frozen=True)
class TokenizedRow:
    """What a row becomes.

    Attributes:
        row: Where it is from.
        ids: Its tokens, at most `data.max_length`.
        mask: 1 at targets.
        length: Tokens before it was cut.
        prompt_length: Tokens before the last assistant turn, 0 where there is none.
        reference: The text of that turn.
    """

    row: Row
    ids: Int[ndarray, "tokens"]
    mask: UInt8[ndarray, "tokens"]
    length: int
    prompt_length: int
    reference: str


class RowTokenizer:
    """Renders and tokenises rows, and marks their targets.

    Args:
        chat: Renders.
        data: How rows are read, cut and trained on.
        stats: Where what becomes of the rows is counted.
    """

    def __init__(self, chat: ChatTokenizer, data: DataSection, stats: DataStats) -> None:
        self._chat, self._data, self._stats = chat, data, stats

    def __call__(self, rows: Iterable[Row]) -> Iterator[TokenizedRow]:
        """What becomes of the rows, in their order; some at a time are in memory.

        Raises:
            InputError: For the first row that cannot be read or has nothing to train on, unless it may be left out.
        """
        stats, limit = self._stats, self._data.max_length
        for row, document, encoded in self._encode(rows):
            length = len(encoded.ids)
            stats.longest = max(stats.longest, length)
            mask = target_mask(encoded, document, self._data.loss_on)
            kept = mask[:limit]
            if not kept.any():
                beyond = f"all its targets lie beyond data.max_length {limit}"
                self._skip(document.where, beyond if mask.any() else _why_empty(document, self._chat))
                continue
            stats.truncated += length > limit
            stats.dropped_turns += document.dropped
            prompt_length = encoded.first(document.spans[-1]) if document.spans else 0
            yield TokenizedRow(
                row,
                encoded.ids[:limit].copy(),  # a view would keep the rest
                kept.astype(np.uint8),
                length,
                prompt_length if prompt_length < limit else 0,
                document.spans[-1].content if document.spans else "",
            )

    def _encode(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rendered, Encoded]]:
        chunk: list[tuple[Row, Rendered]] = []
        length = 0

        def encoded() -> Iterator[tuple[Row, Rendered, Encoded]]:
            found = self._chat.encode([document for _, document in chunk])
            return ((*part, tokens) for part, tokens in zip(chunk, found, strict=True))

        for row in rows:
            where = row.where
            example = read_row(row.columns, where, format=self._data.format, columns=self._data.columns)
            if isinstance(example, Conversation) and all(turn.role != "assistant" for turn in example.turns):
                self._skip(where, "has no assistant turn")
                continue
            if isinstance(example, Prerendered) and not example.text.strip():
                self._skip(where, "its text is blank")
                continue
            document = self._chat.render(example, where)
            if chunk and (len(chunk) == _CHUNK or length + len(document.text) > _CHUNK_TEXT):
                yield from encoded()
                chunk, length = [], 0
            chunk.append((row, document))
            length += len(document.text)
        yield from encoded()

    def _skip(self, where: str, why: str) -> None:
        if not self._data.skip_empty:
            raise InputError(f"{where}: {why}; mend the row, or leave such rows out with data.skip_empty: true")
        self._stats.skipped += 1


def _why_empty(document: Rendered, chat: ChatTokenizer) -> str:
    if not document.spans and document.is_prerendered:
        return (
            f"no assistant turn found in its text (looked for {chat.turn_markers}); "
            "set data.loss_on: all to train on the whole text"
        )
    if not document.spans:
        return "its assistant turns are blank"
    if not any(span.trained for span in document.spans):
        return "every assistant turn has loss weight 0"
    return "none of its tokens is a target"


def target_mask(encoded: Encoded, document: Rendered, loss_on: str) -> Bool[ndarray, "tokens"]:
    """Which tokens are trained on.

    `assistant`: the assistant's turns, each with the token that ends it; `last`: the last of them;
    `all`: everything. The first token of a document is predicted from nothing, and never a target.
    """
    if loss_on == "all":
        mask = np.ones(encoded.ids.shape, bool)
    else:
        mask = np.zeros(encoded.ids.shape, bool)
        for span in document.spans[-1:] if loss_on == "last" else document.spans:
            if span.trained:
                mask |= encoded.covered_by(span)
    mask[:1] = False
    return mask


def add_notices(stats: DataStats, chat: ChatTokenizer) -> None:
    """Adds to the counts what the user should know of them."""
    if stats.dropped_turns:
        stats.notices.append(
            f"the chat template has no place for system turns: {stats.dropped_turns:,} are not in the text trained on"
        )
    if not chat.ends_turns:
        stats.notices.append("no special token ends the assistant's turns: the model is not taught where to stop")
    if stats.truncated:
        stats.notices.append(f"{stats.truncated:,} rows lost their end; the longest has {stats.longest:,} tokens")
