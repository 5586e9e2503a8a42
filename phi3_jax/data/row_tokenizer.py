"""Rows of any source, one after the other, to tokens and targets; what became of them is counted."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.ahead import ahead
from phi3_jax.data.chat import ChatTokenizer, check_length
from phi3_jax.data.encoded import Encoded
from phi3_jax.data.formats import Conversation, Example, Prerendered, Reading, Tokens, read_row
from phi3_jax.data.rows import MOST_NAMED, DataStats
from phi3_jax.data.sources import Source
from phi3_jax.data.spans import Rendered
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import counted

# Rows and characters tokenised in one call: enough to keep every core busy, little memory. Two such are alive.
_CHUNK, _CHUNK_TEXT = 1000, 2**22
# Rows and characters that are rendered in one request, where a process renders.
_GROUP, _GROUP_TEXT = 32, 2**20


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
        ids: Its tokens, at most `data.max_length` where that cuts rows.
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


# A row, what it holds or why it cannot be used, and what was met in reading it.
_Read = tuple[Row, "Rendered | Tokens | InputError | _EmptyError", Reading]


class RowTokenizer:
    """Renders and tokenises rows, and marks their targets.

    Args:
        chat: Renders.
        data: How rows are read, cut and trained on.
        stats: Where what becomes of the rows is counted.
    """

    def __init__(self, chat: ChatTokenizer, data: DataSection, stats: DataStats) -> None:
        self._chat, self._data, self._stats = chat, data, stats
        # Rows end to end: the first token of one is predicted from the last of another.
        self._first = data.packing and data.packing_strategy == "wrapped"

    def __call__(self, rows: Iterable[Row]) -> Iterator[TokenizedRow]:
        """What becomes of the rows, in their order; some at a time are in memory.

        Raises:
            InputError: For the first row that cannot be read or has nothing to train on, unless it may be left out.
        """
        for chunk, encodings in ahead(self._encoded, self._chunks(rows)):
            yield from self._tokenized(chunk, encodings)

    def _chunks(self, rows: Iterable[Row]) -> Iterator[list[_Read]]:
        """Rows that are tokenised together; a fault comes with its row, so that those before it have their turn."""
        chunk: list[_Read] = []
        length = 0
        for row, example, reading in self._read(rows):
            document: Rendered | Tokens | InputError | _EmptyError
            try:
                if isinstance(example, Exception):
                    raise example
                document = self._rendered(example, reading, row.where)
            except (InputError, _EmptyError) as error:
                document = error
            size = len(document.text) if isinstance(document, Rendered) else 0
            if chunk and (len(chunk) == _CHUNK or length + size > _CHUNK_TEXT):
                yield chunk
                chunk, length = [], 0
            chunk.append((row, document, reading))
            length += size
            if isinstance(document, Exception) and not self._is_passed_over(document):
                break
        yield chunk

    def _read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Example | InputError, Reading]]:
        """The rows as they are read, some before the first of them is rendered."""
        group: list[tuple[Row, Example | InputError, Reading]] = []
        length = 0
        for row in rows:
            reading = Reading()
            example: Example | InputError
            try:
                example = self._example(row, reading)
            except InputError as error:
                example = error
            group.append((row, example, reading))
            if isinstance(example, Conversation):
                length += sum(len(turn.content) for turn in example.turns)
            if len(group) == _GROUP or length > _GROUP_TEXT:
                yield from self._looked_at(group)
                group, length = [], 0
        yield from self._looked_at(group)

    def _looked_at(
        self, group: list[tuple[Row, Example | InputError, Reading]]
    ) -> list[tuple[Row, Example | InputError, Reading]]:
        self._chat.look_ahead([example for _, example, _ in group if not isinstance(example, InputError)])
        return group

    def _example(self, row: Row, reading: Reading) -> Example:
        data = self._data
        return read_row(
            row.columns, row.where, format=data.format, columns=data.columns, ignored=data.ignore_keys, reading=reading
        )

    def _rendered(self, example: Example, reading: Reading, where: str) -> Rendered | Tokens:
        if isinstance(example, Tokens):
            return example
        if isinstance(example, Conversation) and not self._may_train(example):
            raise _EmptyError("has no assistant turn" if example.turns else "has no turns")
        if isinstance(example, Prerendered) and not example.text.strip():
            raise _EmptyError("its text is blank")
        document = self._chat.render(example, where)
        check_length(document.text, where)
        reading.passed_over += document.passed_over
        reading.remarks += document.remarks
        return document

    def _may_train(self, conversation: Conversation) -> bool:
        trains_all = self._data.loss_on in ("all", "completion") and bool(conversation.turns)
        return trains_all or any(turn.role == "assistant" for turn in conversation.turns)

    def _encoded(self, chunk: Sequence[_Read]) -> list[Encoded | InputError]:
        return self._encode([document for _, document, _ in chunk if isinstance(document, Rendered)])

    def _encode(self, documents: Sequence[Rendered]) -> list[Encoded | InputError]:
        """Tokens of each, or what is wrong with it; up to the first fault where that ends the run."""
        try:
            return list(self._chat.encode(documents))
        except InputError as error:
            if len(documents) == 1:
                return [error]
            found = self._encode(documents[: len(documents) // 2])
            if any(isinstance(each, InputError) and not self._is_passed_over(each) for each in found):
                return found
            return found + self._encode(documents[len(documents) // 2 :])

    def _tokenized(self, chunk: Sequence[_Read], encodings: Iterable[Encoded | InputError]) -> Iterator[TokenizedRow]:
        coming = iter(encodings)
        for row, document, reading in chunk:
            try:
                if isinstance(document, Exception):
                    raise document
                if isinstance(document, Tokens):
                    found = self._taken(row, document)
                else:
                    encoded = next(coming)
                    if isinstance(encoded, InputError):
                        raise encoded
                    found = self._marked(row, document, encoded)
            except (InputError, _EmptyError) as error:
                self._leave_out(row.where, error)
            else:
                stats = self._stats
                _count(stats.formats, [reading.format])
                _count(stats.passed_over, reading.passed_over)
                _count(stats.remarks, reading.remarks)
                yield found

    def _marked(self, row: Row, document: Rendered, encoded: Encoded) -> TokenizedRow:
        mask = target_mask(encoded, document, self._data.loss_on, first=self._first)
        self._check_targets(mask, lambda: _why_empty(document, self._chat))
        stats, answer = self._stats, document.answer
        stats.dropped_turns += document.dropped
        if document.is_literal:
            stats.literal_rows += 1
            stats.first_literal = stats.first_literal or row.where
        prompt_length = encoded.covered_by(answer)[0] if answer else 0
        return self._cut(row, encoded.ids, mask, prompt_length, answer.content if answer else "")

    def _taken(self, row: Row, tokens: Tokens) -> TokenizedRow:
        """A row that was tokenised elsewhere; its answer is the last run of targets."""
        mask = np.ones_like(tokens.mask) if self._data.loss_on == "all" else tokens.mask.copy()
        mask[:1] &= self._first
        self._check_targets(mask, lambda: "none of its tokens is a target")
        end = len(mask) - int(mask[::-1].argmax())
        start = end - int((~mask[:end])[::-1].argmax())
        return self._cut(row, tokens.ids.astype(np.int32), mask, start, self._chat.decode(tokens.ids[start:end]))

    def _check_targets(self, mask: Bool[ndarray, "tokens"], why: Callable[[], str]) -> None:
        self._stats.longest = max(self._stats.longest, len(mask))
        if self._kept(mask).any():
            return
        if not mask.any():
            raise _EmptyError(why())
        if not (self._data.packing and self._data.packs_as_trl):
            where = "beyond" if self._data.truncation_mode == "keep_start" else "before the last"
            raise _EmptyError(f"all its targets lie {where} data.max_length {self._data.max_length}")
        _count(self._stats.remarks, ["all targets lie beyond data.max_length: packed all the same, as TRL does"])

    def _kept(self, mask: Bool[ndarray, "tokens"]) -> Bool[ndarray, "kept"]:
        """The targets of a row once it is cut."""
        part = self._part(len(mask))
        kept = mask[part].copy()
        if part.start:
            kept[:1] = False
        return kept

    def _part(self, length: int) -> slice:
        """What is kept of a row."""
        limit = self._data.max_length
        if limit is None or length <= limit or not self._data.cuts:
            return slice(0, length)
        return slice(0, limit) if self._data.truncation_mode == "keep_start" else slice(length - limit, length)

    def _cut(
        self,
        row: Row,
        ids: Int[ndarray, "tokens"],
        mask: Bool[ndarray, "tokens"],
        prompt_length: int,
        reference: str,
    ) -> TokenizedRow:
        part, stats = self._part(len(ids)), self._stats
        if part.stop - part.start < len(ids):
            stats.truncated += 1
            if len(stats.truncated_rows) < MOST_NAMED:
                stats.truncated_rows.append(row.where)
        return TokenizedRow(
            row,
            ids[part].copy(),  # a view would keep the rest
            self._kept(mask).astype(np.uint8),
            len(ids),
            prompt_length - part.start if part.start < prompt_length < part.stop else 0,
            reference,
        )

    def _is_passed_over(self, fault: Exception) -> bool:
        return self._data.skip_invalid or (self._data.skip_empty and isinstance(fault, _EmptyError))

    def _leave_out(self, where: str, fault: "InputError | _EmptyError") -> None:
        is_empty, why = isinstance(fault, _EmptyError), str(fault)
        if self._is_passed_over(fault):
            self._stats.leave_out(where, why.removeprefix(where).lstrip(",: "), is_empty=is_empty)
        elif is_empty:
            raise InputError(f"{where}: {why}; mend the row, or leave such rows out with data.skip_empty: true")
        else:
            raise fault


class _EmptyError(Exception):
    """A row has nothing to train on."""


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
    if document.completion == ():
        return "what the template makes of its completion could not be told from the rest"
    return "none of its tokens is a target"


def target_mask(encoded: Encoded, document: Rendered, loss_on: str, *, first: bool = False) -> Bool[ndarray, "tokens"]:
    """Which tokens are trained on.

    `assistant`: the assistant's turns, each with the token that ends it; `last`: the last of them; `all`: everything;
    `completion`: the completion of a row that has one, everything of another.
    The first token of a document is predicted from nothing, and a target only where `first` is true.
    """
    spans = document.spans
    if loss_on == "completion" and document.completion is not None:
        spans = document.completion
    if loss_on == "all" or (loss_on == "completion" and document.completion is None):
        mask = np.ones(encoded.ids.shape, bool)
    else:
        mask = np.zeros(encoded.ids.shape, bool)
        for span in spans:
            if span.trained and (loss_on != "last" or document.answer is None or span.end > document.answer.start):
                mask[slice(*encoded.covered_by(span))] = True
    mask[:1] &= first
    return mask


def _count(counts: dict[str, int], names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        counts[name] = counts.get(name, 0) + 1


def _counts(of: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counted(count, 'row')})" for name, count in of.items())


def add_notices(stats: DataStats, chat: ChatTokenizer, data: DataSection) -> None:
    """Puts into words what the user should know of the counts."""
    found = []
    if len(stats.formats) > 1:
        found.append(f"formats: {_counts(stats.formats)}")
    if stats.passed_over:
        found.append(f"passed over, since nothing reads it: {_counts(stats.passed_over)}")
    if stats.literal_rows:
        found.append(
            f"{counted(stats.literal_rows, 'row')} differ from apply_chat_template, since control tokens in texts stay "
            f"text; the first is {stats.first_literal}; data.literal_roles says in whose texts"
        )
    if stats.dropped_turns:
        found.append(
            f"the chat template has no place for system turns: {stats.dropped_turns:,} are not in the text trained on"
        )
    if not chat.ends_turns:
        found.append("no control token ends the assistant's turns: the model is not taught where to stop")
    if stats.invalid:
        where, why = stats.left_out[0]
        how_many = f"{counted(stats.invalid, 'row')} as invalid, {stats.skipped:,} as empty"
        found.append(f"left out: {how_many}; the first: {where}: {why}")
    if stats.truncated:
        lost = "end" if data.truncation_mode == "keep_start" else "beginning"
        found.append(f"{counted(stats.truncated, 'row')} lost their {lost}; the longest has {stats.longest:,} tokens")
    stats.notices = found + [f"{text} ({counted(count, 'row')})" for text, count in stats.remarks.items()]
