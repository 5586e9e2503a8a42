"""Batches of packed or padded rows, through Grain: prefetched, and resumed exactly."""

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import SupportsIndex

import grain
import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data.batch import HostBatch
from phi3_jax.data.packing import plan_epoch
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.system.buckets import bucket
from phi3_jax.system.errors import InputError

# Rows are in memory, so that one thread that stays a few batches ahead is all it takes.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)

OTHER_ROWS = (
    "the checkpoint was written with other training rows, batch sizes or seed; "
    "resume with the same data and settings (of rows in memory, the same in the same order), or start anew"
)


class ResumableBatches(Iterator[HostBatch]):
    """Batches that go on where a state says, if that is of the same rows and settings.

    Args:
        fingerprint: Of these, the same in all processes that share the batches.
        iterator: Grain's, which makes them.

    Attributes:
        fingerprint: As given.
    """

    def __init__(self, fingerprint: str, iterator: grain.DatasetIterator[object]) -> None:
        self.fingerprint, self._iterator = fingerprint, iterator

    def get_state(self) -> dict[str, object]:
        """Where the iterator stands, for JSON."""
        return {**self._iterator.get_state(), "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, object]) -> None:
        """Continues with the very batch that would have come next.

        Raises:
            InputError: Where rows or settings are not those of the state.
        """
        own = dict(state)
        if own.pop("fingerprint", None) != self.fingerprint:
            raise InputError(OTHER_ROWS)
        self._iterator.set_state(own)

    def close(self) -> None:
        """Ends what reads ahead."""
        self._iterator.close()


class Batches(ResumableBatches):
    """Training batches; see `train_batches`.

    Attributes:
        steps_per_epoch: Exact, the same in every epoch. A last partial batch counts.
        batch_of: The batch of a step, steps counted from 0.
    """

    def __init__(self, steps: "_TrainingSteps") -> None:
        super().__init__(steps.fingerprint, iter(grain.MapDataset.source(steps).to_iter_dataset(_READ_OPTIONS)))
        self.steps_per_epoch = steps.per_epoch
        self._steps, self.batch_of = steps, steps.__getitem__

    def __next__(self) -> HostBatch:
        batch = next(self._iterator)
        assert isinstance(batch, dict)
        return batch

    def epochs_at(self, step: int) -> float:
        """How often the rows have come after so many steps."""
        return step / self.steps_per_epoch

    def step_rows(self, step: int) -> tuple[TokenizedRows, list[list[int]]]:
        """All rows, and those that each sequence of a step, counted from 0, holds, micro-batch after micro-batch."""
        return self._steps.rows, self._steps.rows_of(step)


def train_batches(
    rows: TokenizedRows,
    data: DataSection,
    *,
    batch_size: int,
    accumulation: int,
    epochs: int | None,
    seed: int,
    pad_id: int,
    part: Sequence[int] | None = None,
) -> Batches:
    """Batches for `epochs` epochs, or without end for None; one for each optimizer step.

    Args:
        rows: The training rows.
        data: How they are packed, shuffled and cut.
        batch_size: Sequences of a micro-batch, over all processes.
        accumulation: Micro-batches of a step.
        epochs: How often every row comes.
        seed: Of the order.
        pad_id: The token that fills sequences up.
        part: Which sequences of a micro-batch to assemble (default: all), where several processes share the
            batches. `length` and the order are those of the whole; a state is good for any part.

    Returns:
        An iterator of dictionaries of int32 `[accumulation, batch_size, length]`: `input_ids` (padded right with
        `pad_id`), `positions` (restarting with every document), `segment_ids` (documents from 1, 0 at padding) and
        `loss_mask`. `length` is `data.max_length` with packing, else the smallest bucket for the rows of the step.
        The last batch of an epoch is filled up with empty sequences.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> ids, offsets = np.arange(5, 10), np.array([0, 2, 5])  # rows of 2 and 3 tokens
        >>> rows = TokenizedRows(ids, np.ones(5, np.uint8), offsets, np.zeros(2, int), ["", ""], DataStats())
        >>> data = DataSection(train="chats.jsonl", max_length=6, packing=True)
        >>> batches = train_batches(rows, data, batch_size=1, accumulation=1, epochs=1, seed=0, pad_id=0)
        >>> batches.steps_per_epoch
        1
        >>> batch = next(batches)
        >>> batch["input_ids"].shape, batch["segment_ids"].tolist(), batch["positions"].tolist()
        ((1, 1, 6), [[[1, 1, 1, 2, 2, 0]]], [[[0, 1, 2, 0, 1, 0]]])
    """
    return Batches(_TrainingSteps(rows, data, batch_size, accumulation, epochs, seed, pad_id, part))


def eval_batches(
    rows: TokenizedRows, data: DataSection, *, batch_size: int, pad_id: int, part: Sequence[int] | None = None
) -> Iterable[HostBatch]:
    """Every row exactly once, in dictionaries as of `train_batches` but `[batch_size, length]`.

    Packed if training is; else rows of like length share a batch.

    Args:
        rows: The evaluation rows.
        data: As for `train_batches`, as are `pad_id` and `part`.
        batch_size: Sequences of a batch, over all processes.
        pad_id: The token that fills sequences up.
        part: Which sequences of each batch to assemble.

    Returns:
        The batches; they can be iterated again.
    """
    batches: Iterable[HostBatch] = grain.MapDataset.source(
        _EvaluationSteps(rows, data, batch_size, pad_id, part)
    ).to_iter_dataset(_READ_OPTIONS)
    return batches


def eval_order(rows: TokenizedRows, data: DataSection) -> list[list[int]]:
    """The rows that each sequence of `eval_batches` holds, in the order in which they come."""
    # The order is no matter for sums, so it may be the one that pads least: that of a shuffled
    # plan when packing, by length when padding.
    lengths = rows.lengths
    plan = plan_epoch(lengths, data, seed=0, epoch=0)
    return plan if data.packing else sorted(plan, key=lambda sequence: int(lengths[sequence[0]]))


class _TrainingSteps:
    """Grain's data source: item `i` is the batch of step `i`."""

    def __init__(
        self,
        rows: TokenizedRows,
        data: DataSection,
        batch_size: int,
        accumulation: int,
        epochs: int | None,
        seed: int,
        pad_id: int,
        part: Sequence[int] | None,
    ) -> None:
        self.rows, self._data, self._seed, self._pad_id = rows, data, seed, pad_id
        self._shape, self._part = (accumulation, batch_size), part
        self._planned = 0, plan_epoch(rows.lengths, data, seed=seed, epoch=0)
        self.per_epoch = math.ceil(len(self._planned[1]) / (accumulation * batch_size))
        self._length = sys.maxsize if epochs is None else epochs * self.per_epoch
        digest = hashlib.sha256()
        for array in (rows.input_ids, rows.loss_mask, rows.offsets):
            digest.update(np.ascontiguousarray(array).data)
        settings = data.max_length, data.packing, data.shuffle, self._shape, seed, pad_id
        digest.update(repr(settings).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: SupportsIndex) -> HostBatch:
        accumulation, batch_size = self._shape
        sequences = self.rows_of(int(step))
        batch = assemble(
            self.rows,
            sequences,
            self._data,
            batch_size=batch_size,
            pad_id=self._pad_id,
            part=self._part,
            accumulation=accumulation,
        )
        return {name: array.reshape(accumulation, -1, array.shape[-1]) for name, array in batch.items()}

    def rows_of(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.per_epoch)
        # Taken and put back as one: the loop may ask, too, while Grain's thread is ahead in another epoch.
        planned, plan = self._planned
        if epoch != planned:
            plan = plan_epoch(self.rows.lengths, self._data, seed=self._seed, epoch=epoch)
            self._planned = epoch, plan
        size = math.prod(self._shape)
        return plan[index * size : (index + 1) * size]


class _EvaluationSteps:
    """Grain's data source: item `i` is the evaluation batch `i`."""

    def __init__(
        self, rows: TokenizedRows, data: DataSection, batch_size: int, pad_id: int, part: Sequence[int] | None
    ) -> None:
        self._rows, self._data, self._batch_size, self._pad_id, self._part = rows, data, batch_size, pad_id, part
        self._plan = eval_order(rows, data)

    def __len__(self) -> int:
        return math.ceil(len(self._plan) / self._batch_size)

    def __getitem__(self, index: SupportsIndex) -> HostBatch:
        size = self._batch_size
        sequences = self._plan[int(index) * size : (int(index) + 1) * size]
        return assemble(self._rows, sequences, self._data, batch_size=size, pad_id=self._pad_id, part=self._part)


def sequence_length(longest: int, max_length: int) -> int:
    """The bucket that holds the longest row: a power of two, at least 64 and at most `max_length`."""
    return min(bucket(longest, least=64, doubling=max_length), max_length)


def assemble(
    rows: TokenizedRows,
    sequences: Sequence[Sequence[int]],
    data: DataSection,
    *,
    batch_size: int,
    pad_id: int,
    part: Sequence[int] | None = None,
    accumulation: int = 1,
) -> HostBatch:
    """A batch of sequences, each given by the rows that it holds; those that are wanting are empty.

    Args:
        rows: The rows.
        sequences: At most `accumulation * batch_size`.
        data: How they are packed and cut.
        batch_size: Sequences of a micro-batch.
        pad_id: The token that fills sequences up.
        part: Which sequences of each micro-batch to assemble; default: all.
        accumulation: Micro-batches.

    Returns:
        Dictionaries of int32 `[accumulation * len(part), length]` as of `train_batches`.
    """
    part = range(batch_size) if part is None else part
    assert all(0 <= row < batch_size for row in part), f"rows {part} of a batch of {batch_size}"
    chosen = [micro * batch_size + row for micro in range(accumulation) for row in part]
    # By all of them, so that every process has the same shape.
    lengths = rows.lengths
    longest = max(sum(int(lengths[row]) for row in sequence) for sequence in sequences)
    shape = len(chosen), data.max_length if data.packing else sequence_length(longest, data.max_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("positions", "segment_ids", "loss_mask")}
    batch["input_ids"] = np.full(shape, pad_id, np.int32)
    for index, choice in enumerate(chosen):
        start = 0
        for segment, row in enumerate(sequences[choice] if choice < len(sequences) else [], 1):
            ids, mask = rows[row]
            here = np.s_[index, start : start + len(ids)]
            batch["input_ids"][here] = ids
            batch["loss_mask"][here] = mask
            batch["segment_ids"][here] = segment
            batch["positions"][here] = np.arange(len(ids))
            start += len(ids)
    return batch
