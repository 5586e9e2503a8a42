"""Batches of packed or padded rows, through Grain: prefetched, and resumed exactly."""

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.packing import bucket_length, plan_epoch
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.system.errors import InputError

Batch = dict[str, Int32[ndarray, "..."]]

# Rows are in memory, so that one thread that stays a few batches ahead is all it takes.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Batches(Iterator[Batch]):
    """Training batches; see `train_batches`.

    - `steps_per_epoch`: exact, the same in every epoch. A last partial batch counts.
    - `fingerprint`: of rows and settings, the same in all processes that share the batches.
    - `get_state()`: a JSON-able dictionary. `set_state(state)` continues with the very batch that
      would have come next; it raises `InputError` where rows or settings are not those of the state.
    - `batch_of(step)`: that step's batch, steps counted from 0. `rows_of(step)`: the rows that each of its
      sequences holds, micro-batch after micro-batch.
    """

    def __init__(self, steps: "_TrainingSteps") -> None:
        self.steps_per_epoch = steps.per_epoch
        self.fingerprint = steps.fingerprint
        self.rows_of, self.batch_of = steps.rows_of, steps.__getitem__
        self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(_READ_OPTIONS))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {**self._iterator.get_state(), "fingerprint": self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if state.pop("fingerprint", None) != self.fingerprint:
            raise InputError(
                "the checkpoint was written with other training rows, batch sizes or seed; "
                "resume with the same data and settings, or start anew"
            )
        self._iterator.set_state(state)


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

    **Returns** an iterator of dictionaries of int32 `[accumulation, batch_size, length]`:
    `input_ids` (padded right with `pad_id`), `positions` (restarting with every document),
    `segment_ids` (documents from 1, 0 at padding) and `loss_mask`. `length` is `data.max_length`
    with packing, else the smallest bucket (`packing.bucket_length`) for the rows of the step. The last
    batch of an epoch is filled up with empty sequences.

    **Arguments**
    - `batch_size`: sequences of a micro-batch, over all processes.
    - `part`: which of them to assemble (default: all), where several processes share the batches.
      `length` and the order are those of the whole; a state is good for any part.
    """
    return Batches(_TrainingSteps(rows, data, batch_size, accumulation, epochs, seed, pad_id, part))


def eval_batches(
    rows: TokenizedRows, data: DataSection, *, batch_size: int, pad_id: int, part: Sequence[int] | None = None
) -> Iterable[Batch]:
    """Every row exactly once, in dictionaries as of `train_batches` but `[batch_size, length]`.

    The result can be iterated again. Packed if training is; else rows of like length share a batch.

    **Arguments**: `part`, which sequences of each batch to assemble, as in `train_batches`.
    """
    steps = _EvaluationSteps(rows, data, batch_size, pad_id, part)
    return grain.MapDataset.source(steps).to_iter_dataset(_READ_OPTIONS)


def eval_order(rows: TokenizedRows, data: DataSection) -> list[list[int]]:
    """The rows that each sequence of `eval_batches` holds, in the order in which they come."""
    # The order is no matter for sums, so it may be the one that pads least: that of a shuffled
    # plan when packing, by length when padding.
    lengths = rows.lengths
    plan = plan_epoch(lengths, data, seed=0, epoch=0)
    return plan if data.packing else sorted(plan, key=lambda sequence: int(lengths[sequence[0]]))


def assemble(
    rows: TokenizedRows,
    sequences: list[list[int]],
    data: DataSection,
    *,
    batch_size: int,
    pad_id: int,
    part: Sequence[int] | None = None,
) -> Batch:
    """A batch as of `eval_batches`: at most `batch_size` sequences, each given by the rows that it holds."""
    return _assemble(rows, sequences, data, _part(part, batch_size), pad_id)


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
        self._rows, self._data, self._seed, self._pad_id = rows, data, seed, pad_id
        self._shape, self._part = (accumulation, batch_size), _part(part, batch_size)
        self._planned = 0, plan_epoch(rows.lengths, data, seed=seed, epoch=0)
        self.per_epoch = math.ceil(len(self._planned[1]) / (accumulation * batch_size))
        self._length = sys.maxsize if epochs is None else epochs * self.per_epoch
        digest = hashlib.sha256()
        for array in (rows.input_ids, rows.loss_mask, rows.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        settings = data.max_length, data.packing, data.shuffle, self._shape, seed, pad_id
        digest.update(repr(settings).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: SupportsIndex) -> Batch:
        accumulation, batch_size = self._shape
        chosen = [start + row for start in range(0, accumulation * batch_size, batch_size) for row in self._part]
        batch = _assemble(self._rows, self.rows_of(int(step)), self._data, chosen, self._pad_id)
        return {name: array.reshape(accumulation, len(self._part), -1) for name, array in batch.items()}

    def rows_of(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.per_epoch)
        # Taken and put back as one: the loop may ask, too, while Grain's thread is ahead in another epoch.
        planned, plan = self._planned
        if epoch != planned:
            plan = plan_epoch(self._rows.lengths, self._data, seed=self._seed, epoch=epoch)
            self._planned = epoch, plan
        size = math.prod(self._shape)
        return plan[index * size : (index + 1) * size]


class _EvaluationSteps:
    """Grain's data source: item `i` is the evaluation batch `i`."""

    def __init__(
        self, rows: TokenizedRows, data: DataSection, batch_size: int, pad_id: int, part: Sequence[int] | None
    ) -> None:
        self._rows, self._data, self._batch_size, self._pad_id = rows, data, batch_size, pad_id
        self._part = _part(part, batch_size)
        self._plan = eval_order(rows, data)

    def __len__(self) -> int:
        return math.ceil(len(self._plan) / self._batch_size)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        sequences = self._plan[int(index) * self._batch_size : (int(index) + 1) * self._batch_size]
        return _assemble(self._rows, sequences, self._data, self._part, self._pad_id)


def _part(part: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    if part is None:
        return range(batch_size)
    assert all(0 <= row < batch_size for row in part), f"rows {part} of a batch of {batch_size}"
    return part


def _assemble(
    rows: TokenizedRows, sequences: list[list[int]], data: DataSection, chosen: Sequence[int], pad_id: int
) -> Batch:
    """The `chosen` of the sequences, those beyond the last one empty."""
    # By all of them, so that every process has the same shape.
    lengths = rows.lengths
    longest = max(sum(int(lengths[row]) for row in sequence) for sequence in sequences)
    length = data.max_length if data.packing else bucket_length(longest, data.max_length)
    shape = len(chosen), length
    batch = {name: np.zeros(shape, np.int32) for name in ("positions", "segment_ids", "loss_mask")}
    batch["input_ids"] = np.full(shape, pad_id, np.int32)
    for index, choice in enumerate(chosen):
        start = 0
        for segment, row in enumerate(sequences[choice] if choice < len(sequences) else [], 1):
            ids, mask = rows[row]
            part = np.s_[index, start : start + len(ids)]
            batch["input_ids"][part] = ids
            batch["loss_mask"][part] = mask
            batch["segment_ids"][part] = segment
            batch["positions"][part] = np.arange(len(ids))
            start += len(ids)
    return batch
