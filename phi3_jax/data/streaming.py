"""Training batches of rows that are read, rendered and packed while it trains, in memory that does not grow with them.

    the source, row by row -> a buffer to shuffle in -> rendered some at a time -> open sequences -> batches

Where it stands is told by how many rows have left the buffer, and by the numbers of those that wait in sequences. To
go on from there the source is read again up to that row, without rendering what has been trained on.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

from grain.experimental import ThreadPrefetchDatasetIterator

from phi3_jax.config.sections import DataSection
from phi3_jax.data.batch import HostBatch
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.collected import Collected
from phi3_jax.data.open_sequences import OpenSequences
from phi3_jax.data.pipeline import ResumableBatches, assemble
from phi3_jax.data.rendered_stream import Position, Rendered, RenderedStream
from phi3_jax.data.row_arrays import from_arrays
from phi3_jax.data.row_streams import RowStream
from phi3_jax.data.row_tokenizer import RowTokenizer, add_notices
from phi3_jax.data.rows import DataStats, TokenizedRows
from phi3_jax.system.errors import InputError

_AHEAD = 4  # batches made beforehand
KEPT_STEPS = 64  # steps whose rows are kept, for messages about losses that are not finite
_FIRST = 100  # rows that are looked at before training


class StreamedRows:
    """Training rows that are rendered while it trains.

    Args:
        stream: The source.
        chat: Renders.
        data: How rows are read, shuffled, packed and cut.

    Attributes:
        first: The first of them, to be shown.
        stats: What became of those that have been trained on.
        check: Looks at the rows of every step before it is taken.

    Raises:
        InputError: Where one of the first rows is wrong, or there are none.
    """

    def __init__(self, stream: RowStream, chat: ChatTokenizer, data: DataSection) -> None:
        self._stream, self._chat, self._data = stream, chat, data
        self.stats = DataStats(stream.names)
        self.check: Callable[[TokenizedRows], None] = lambda rows: None
        self.first = self._look()

    @property
    def once(self) -> bool:
        """Whether the rows can be had only once, as those of a generator."""
        return self._stream.once

    @property
    def max_length(self) -> int:
        """Tokens of a row at most."""
        return self._data.limit

    @property
    def names(self) -> list[str]:
        """Where they are from."""
        return self._stream.names

    def batches(
        self,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        pad_id: int,
        part: Sequence[int] | None = None,
        epochs: int | None = None,
    ) -> "StreamedBatches":
        """As `pipeline.train_batches`, from the first row on."""
        shape = _Shape(batch_size, accumulation, pad_id, part)
        rows = RenderedStream(self._stream, self._chat, self._data, seed=seed, epochs=epochs)
        return StreamedBatches(self, _Steps(rows, self._chat, self._data, self.names, shape, self.check), seed)

    def summary(self) -> str:
        """A line for the console: before training how they come, afterwards what became of them."""
        if self.stats.rows:
            return self.stats.summary("train, streamed")
        order = "as they come"
        if self._data.shuffle:
            order = f"shuffled through a buffer of {self._data.shuffle_buffer_size:,} rows"
        return f"train: streamed from {', '.join(self.names)}, {order}"

    def settings(self) -> dict[str, object]:
        """Keys of the section that are not at their defaults, but for what does not change the training rows."""
        data, default = asdict(self._data), asdict(DataSection())
        for key in ("train", "eval", "eval_split", "cache"):
            del data[key]
        return {key: value for key, value in sorted(data.items()) if value != default[key]}

    def _look(self) -> TokenizedRows:
        names = ", ".join(self.names)
        rows = self._stream.first(_FIRST)
        if not rows:
            raise InputError(f"{names}: no usable rows; the data is empty")
        found = list(RowTokenizer(self._chat, self._data, DataStats(self.names))(row.row for row in rows))
        if not found:
            raise InputError(f"{names}: none of the first {len(rows)} rows has anything to train on")
        return _tokenized([Rendered(0, row) for row in found], self.names)


@dataclass(frozen=True)
class _Shape:
    """How batches are cut, as `pipeline.train_batches` is told."""

    batch_size: int
    accumulation: int
    pad_id: int
    part: Sequence[int] | None


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on.

    Attributes:
        number: Which one, from 0.
        batch: Its arrays.
        rows: Its rows.
        sequences: Which of them each sequence holds.
        epochs: How often the rows have come.
        stats: What became of all rows so far.
    """

    number: int
    batch: HostBatch
    rows: TokenizedRows
    sequences: list[list[int]]
    epochs: float
    stats: DataStats


class StreamedBatches(ResumableBatches):
    """What `pipeline.Batches` is, of streamed rows; the fingerprint is of the settings alone.

    Attributes:
        steps_per_epoch: None: nobody knows.
    """

    steps_per_epoch = None

    def __init__(self, source: StreamedRows, steps: "_Steps", seed: int) -> None:
        self._source, self._steps = source, steps
        settings = source.settings(), replace(steps.shape, part=None), seed
        fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        super().__init__(fingerprint, ThreadPrefetchDatasetIterator(steps, _AHEAD))
        self._kept: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._epochs = 0.0
        source.stats = steps.stats()

    def __next__(self) -> HostBatch:
        step = next(self._iterator)
        assert isinstance(step, Step)
        self._kept.append(replace(step, batch={}))
        self._epochs, self._source.stats = step.epochs, step.stats
        return step.batch

    def set_state(self, state: Mapping[str, object]) -> None:
        """As `ResumableBatches`; the counts are those of the state, too."""
        super().set_state(state)
        self._epochs, self._source.stats = self._steps.epochs, self._steps.stats()

    def epochs_at(self, step: int) -> float:
        """How often the rows have come after the steps so far; 0 before it is known how many there are."""
        return self._epochs

    def step_rows(self, step: int) -> tuple[TokenizedRows, list[list[int]]] | None:
        """The rows of a step, counted from 0, and which of them each sequence holds; None where it is long ago."""
        found = next((kept for kept in self._kept if kept.number == step), None)
        return None if found is None else (found.rows, found.sequences)

    def batch_of(self, step: int) -> HostBatch:
        """The batch of a step that `step_rows` knows."""
        found = self.step_rows(step)
        assert found is not None
        return self._steps.assembled(*found)

    def close(self) -> None:
        """Ends what reads ahead, and gives it up: Grain's iterator complains where it outlives its module."""
        if (iterator := vars(self).pop("_iterator", None)) is not None:
            iterator.close()


class _Steps(Iterator[Step]):
    """Makes the steps, one after the other."""

    def __init__(
        self,
        rows: RenderedStream,
        chat: ChatTokenizer,
        data: DataSection,
        names: Sequence[str],
        shape: _Shape,
        check: Callable[[TokenizedRows], None],
    ) -> None:
        self._check = check
        self._rows, self._chat, self._data, self._names, self.shape = rows, chat, data, names, shape
        self._sequences: OpenSequences[Rendered] = OpenSequences(data.limit, lambda row: row.length)
        self._ready: list[list[Rendered]] = []
        self._counts = {"steps": 0, "rows": 0, "tokens": 0, "target_tokens": 0, "sequences": 0}

    @property
    def epochs(self) -> float:
        """How often the rows have come; 0 before it is known how many there are."""
        rows = self._rows.position["rows"]
        return self._counts["rows"] / rows if rows else 0.0

    def stats(self) -> DataStats:
        """What became of the rows of all steps so far."""
        counts = self._counts
        stats = replace(
            self._rows.stats,
            rows=counts["rows"],
            tokens=counts["tokens"],
            target_tokens=counts["target_tokens"],
            notices=[],
        )
        if self._data.packing and counts["sequences"]:
            stats.packing_efficiency = counts["tokens"] / (counts["sequences"] * self._data.limit)
        add_notices(stats, self._chat, self._data)
        rendered = sum(stats.formats.values())
        if rendered > stats.rows:
            stats.notices.append(
                f"formats, keys and rows left out are those of {rendered:,} rows, which were rendered so far"
            )
        return stats

    def __next__(self) -> Step:
        size = self.shape.batch_size * self.shape.accumulation
        while len(self._ready) < size:
            row = next(self._rows, None)
            if row is None:
                self._ready += self._sequences.flush()
                break
            self._ready += self._sequences.add(row) if self._data.packing else [[row]]
        if not self._ready:
            raise StopIteration
        taken, self._ready = self._ready[:size], self._ready[size:]
        return self._step(taken)

    def _step(self, taken: list[list[Rendered]]) -> Step:
        rows = _tokenized([row for sequence in taken for row in sequence], self._names)
        self._check(rows)
        numbers = iter(range(len(rows)))
        sequences = [[next(numbers) for _ in sequence] for sequence in taken]
        more = 1, len(rows), len(rows.input_ids), int(rows.loss_mask.sum()), len(sequences)
        number = self._counts["steps"]
        self._counts = {name: self._counts[name] + count for name, count in zip(self._counts, more, strict=True)}
        return Step(number, self.assembled(rows, sequences), rows, sequences, self.epochs, self.stats())

    def assembled(self, rows: TokenizedRows, sequences: list[list[int]]) -> HostBatch:
        """The batch of a step's rows."""
        shape = self.shape
        batch = assemble(
            rows,
            sequences,
            self._data,
            batch_size=shape.batch_size,
            pad_id=shape.pad_id,
            part=shape.part,
            accumulation=shape.accumulation,
        )
        return {name: array.reshape(shape.accumulation, -1, array.shape[-1]) for name, array in batch.items()}

    def get_state(self) -> dict[str, object]:
        return {
            "position": dict(self._rows.position),
            "open": _numbers(self._sequences.open),
            "ready": _numbers(self._ready),
            "counts": dict(self._counts),
        }

    def set_state(self, state: dict[str, object]) -> None:
        waiting = [cast(list[list[int]], state[name]) for name in ("open", "ready")]
        wanted = {number for sequences in waiting for sequence in sequences for number in sequence}
        found = self._rows.restore(cast(Position, state["position"]), wanted)
        again, self._ready = [
            [[found[number] for number in sequence] for sequence in sequences] for sequences in waiting
        ]
        self._sequences.restore(again)
        self._counts = dict(cast(dict[str, int], state["counts"]))


def _numbers(sequences: Sequence[Sequence[Rendered]]) -> list[list[int]]:
    return [[row.number for row in sequence] for sequence in sequences]


def _tokenized(rows: Sequence[Rendered], names: Sequence[str]) -> TokenizedRows:
    collected = Collected(names)
    for each in rows:
        collected.add(each.row)
    arrays = collected.arrays()
    del arrays["lengths"]  # before they were cut
    return from_arrays(arrays, DataStats(list(names)), names)
