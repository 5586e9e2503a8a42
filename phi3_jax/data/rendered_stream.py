"""Rows of a stream shuffled and rendered, epoch after epoch, and where that stands."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.pipeline import OTHER_ROWS
from phi3_jax.data.row_streams import RowStream, StreamedRow
from phi3_jax.data.row_tokenizer import RowTokenizer, TokenizedRow
from phi3_jax.data.rows import DataStats
from phi3_jax.system.errors import InputError

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")

CHUNK = 32  # rows rendered together: a step should not wait for more than it needs


def shuffled(rows: Iterable[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """The rows in an order drawn through a buffer: one leaves it for each that comes once it is full, then the rest.

    Example:
        >>> "".join(shuffled("abcdefgh", 4, np.random.default_rng(0)))
        'dcfbegha'
    """
    rest = iter(rows)
    held = list(islice(rest, size))
    for row in rest:
        place = int(rng.integers(len(held)))
        row, held[place] = held[place], row
        yield row
    yield from (held[place] for place in rng.permutation(len(held)))


@dataclass(frozen=True)
class Rendered:
    """A tokenised row, and its number in the stream."""

    number: int
    row: TokenizedRow

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.row.ids)


class Position(TypedDict):
    """Where a `RenderedStream` stands.

    Attributes:
        epoch: How often the source has ended.
        begun: Rows of this epoch before those that are rendered together now, `chunk` of them.
        chunk: Those.
        used: How many of what became of the chunk have been given out.
        digest: Of the `begun` rows.
        usable: Rows that were given out in this epoch.
        rows: How many an epoch gives out; None before the source has ended once.
        stats: What became of all rows before the chunk.
    """

    epoch: int
    begun: int
    chunk: int
    used: int
    digest: str
    usable: int
    rows: int | None
    stats: dict[str, object]


def _start(stats: DataStats, *, epoch: int = 0, rows: int | None = None) -> Position:
    """Before the first row of an epoch."""
    return {
        "epoch": epoch,
        "begun": 0,
        "chunk": 0,
        "used": 0,
        "digest": _digest(hashlib.sha256()),
        "usable": 0,
        "rows": rows,
        "stats": stats.to_dict(),
    }


class RenderedStream(Iterator[Rendered]):
    """Gives the rows of a stream that can be trained on, in another order every epoch.

    Args:
        stream: The source.
        chat: Renders.
        data: How rows are read, shuffled and cut.
        seed: Of the order.
        epochs: How often the source is gone through; None for without end. One that gives its rows once ends then.

    Attributes:
        position: Where it stands.
        stats: What became of the rows that have been rendered.
    """

    def __init__(
        self, stream: RowStream, chat: ChatTokenizer, data: DataSection, *, seed: int, epochs: int | None = None
    ) -> None:
        self._stream, self._chat, self._data, self._seed = stream, chat, data, seed
        self._epochs = 1 if stream.once else epochs
        self.stats = DataStats(stream.names)
        self.position = _start(self.stats)
        self._chunk: list[Rendered] = []
        self._begin_epoch(stream)

    def __next__(self) -> Rendered:
        while self.position["used"] == len(self._chunk):
            if not self._read_chunk():
                self._end_epoch()
        position = self.position  # of the epoch that it is now
        position["used"] += 1
        position["usable"] += 1
        return self._chunk[position["used"] - 1]

    def restore(self, position: Position, wanted: Collection[int]) -> Mapping[int, Rendered]:
        """Goes on from there.

        Args:
            position: Of another object with the same rows and settings.
            wanted: Numbers of rows that were given out before, and are needed once more.

        Returns:
            Those, by number.

        Raises:
            InputError: Where the rows are others.
        """
        kept: dict[int, StreamedRow] = {}

        def watched(rows: Iterable[StreamedRow]) -> Iterator[StreamedRow]:
            for row in rows:
                if row.number in wanted:
                    kept[row.number] = row
                yield row

        self.position = Position(**{**position, "chunk": 0, "used": 0})
        self.stats = DataStats.from_dict(position["stats"])
        self._chunk = []
        self._begin_epoch(watched(self._stream))
        passed = 0
        for row in islice(self._rows, position["begun"]):
            self._hash.update(row.digest)
            passed += 1
        if passed < position["begun"] or _digest(self._hash) != position["digest"]:
            raise InputError(OTHER_ROWS)
        if len(kept) < len(wanted) and not self._stream.once:  # those of the epoch before stand anywhere
            any(len(kept) == len(wanted) for _ in watched(self._stream))
        if position["chunk"] and (not self._read_chunk() or len(self._chunk) < position["used"]):
            raise InputError(OTHER_ROWS)
        self.position["used"] = position["used"]
        tokenize = RowTokenizer(self._chat, self._data, DataStats(self._stream.names))
        again = {found.number: found for found in _rendered(tokenize, list(kept.values()))}
        if set(wanted) - set(again):
            raise InputError(OTHER_ROWS)
        return again

    def _begin_epoch(self, rows: Iterable[StreamedRow]) -> None:
        rng = np.random.default_rng([self._seed, self.position["epoch"]])
        # Rows that can be had only once are asked for with the first one.
        order = (
            shuffled(rows, self._data.shuffle_buffer_size, rng) if self._data.shuffle else chain.from_iterable([rows])
        )
        self._rows: Iterator[StreamedRow] = order
        self._hash = hashlib.sha256()

    def _read_chunk(self) -> bool:
        """Renders the next rows; whether there are any."""
        position = self.position
        position["begun"], position["chunk"], position["used"] = position["begun"] + position["chunk"], 0, 0
        position["digest"], position["stats"] = _digest(self._hash), self.stats.to_dict()
        self._chunk = []
        rows = list(islice(self._rows, CHUNK))
        for row in rows:
            self._hash.update(row.digest)
        position["chunk"] = len(rows)
        self.stats = deepcopy(self.stats)  # others may hold what it was
        self._chunk = list(_rendered(RowTokenizer(self._chat, self._data, self.stats), rows))
        return bool(rows)

    def _end_epoch(self) -> None:
        position, names = self.position, ", ".join(self._stream.names)
        if not position["usable"]:
            raise InputError(f"{names}: no usable rows; all {position['begun']:,} have nothing to train on")
        if self._epochs is not None and position["epoch"] + 1 >= self._epochs:
            raise StopIteration
        self.position = _start(self.stats, epoch=position["epoch"] + 1, rows=position["usable"])
        self._begin_epoch(self._stream)


def _rendered(tokenize: RowTokenizer, rows: list[StreamedRow]) -> Iterator[Rendered]:
    numbers = {id(row.row): row.number for row in rows}
    return (Rendered(numbers[id(found.row)], found) for found in tokenize(row.row for row in rows))


def _digest(of: "_Hash") -> str:
    return of.hexdigest()[:32]
