"""Batches of packed or padded rows, through Grain: prefetched, and resumed exactly."""

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import grain
import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data.batch import HostBatch
from phi3_jax.data.packing import Order, plan_epoch
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.system.buckets import bucket
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import counted

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
    group_by_length: bool = False,
    drop_last: bool = False,
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
        group_by_length: Whether sequences of like length share a step; see `packing.grouped`.
        drop_last: Whether sequences that fill no micro-batch at the end of an epoch are left out.

    Raises:
        InputError: Where nothing is left.

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
    order = Order(seed, batch_size * accumulation if group_by_length else None)
    shape = _Shape(batch_size, accumulation, pad_id, part, drop_last)
    return Batches(_TrainingSteps(rows, data, order, shape, epochs))


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
    plan = plan_epoch(rows, data, Order(0), 0)
    return plan if data.packing else sorted(plan, key=lambda sequence: int(lengths[sequence[0]]))


@dataclass(frozen=True)
class _Shape:
    """How batches are cut, as `train_batches` is told."""

    batch_size: int
    accumulation: int
    pad_id: int
    part: Sequence[int] | None
    drop_last: bool

    @property
    def step(self) -> int:
        """Sequences of a step."""
        return self.batch_size * self.accumulation


class _TrainingSteps:
    """Grain's data source: item `i` is the batch of step `i`."""

    def __init__(self, rows: TokenizedRows, data: DataSection, order: Order, shape: _Shape, epochs: int | None) -> None:
        self.rows, self._data, self._order, self._shape = rows, data, order, shape
        self._planned = 0, self._plan(0)
        self.per_epoch = math.ceil(len(self._planned[1]) / shape.step)
        if not self.per_epoch:
            raise InputError(
                f"training.dataloader_drop_last is true, but {counted(len(rows), 'row')} fill no batch of "
                f"{shape.batch_size}; give a smaller training.per_device_train_batch_size, or leave it out"
            )
        self._length = sys.maxsize if epochs is None else epochs * self.per_epoch
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        digest, rows, data, shape = hashlib.sha256(), self.rows, self._data, self._shape
        for array in (rows.input_ids, rows.loss_mask, rows.offsets):
            digest.update(np.ascontiguousarray(array).data)
        cut = shape.accumulation, shape.batch_size
        digest.update(repr((data.max_length, data.packing, data.shuffle, cut, self._order.seed, shape.pad_id)).encode())
        # Where they say nothing the name is the one of runs that were begun before there were such settings.
        others = data.packing and data.packs_as_trl and data.packing_strategy, self._order.group, shape.drop_last
        if any(others):
            digest.update(repr(others).encode())
        return digest.hexdigest()[:16]

    def _plan(self, epoch: int) -> list[list[int]]:
        plan, size = plan_epoch(self.rows, self._data, self._order, epoch), self._shape.batch_size
        return plan[: len(plan) // size * size] if self._shape.drop_last else plan

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: SupportsIndex) -> HostBatch:
        shape = self._shape
        batch = assemble(
            self.rows,
            self.rows_of(int(step)),
            self._data,
            batch_size=shape.batch_size,
            pad_id=shape.pad_id,
            part=shape.part,
            accumulation=shape.accumulation,
        )
        return {name: array.reshape(shape.accumulation, -1, array.shape[-1]) for name, array in batch.items()}

    def rows_of(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.per_epoch)
        # Taken and put back as one: the loop may ask, too, while Grain's thread is ahead in another epoch.
        planned, plan = self._planned
        if epoch != planned:
            plan = self._plan(epoch)
            self._planned = epoch, plan
        size = self._shape.step
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


def sequence_length(longest: int, max_length: int | None) -> int:
    """The bucket that holds the longest row: a power of two, at least 64 and at most `max_length`.

    Example:
        >>> sequence_length(90, 100), sequence_length(90, None)
        (100, 128)
    """
    limit = sys.maxsize if max_length is None else max_length
    return min(bucket(longest, least=64, doubling=limit), limit)


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
    shape = len(chosen), data.limit if data.packing else sequence_length(longest, data.max_length)
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
