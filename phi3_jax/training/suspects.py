"""Which rows a loss that is not finite comes from."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from phi3_jax.config.sections import DataSection
from phi3_jax.data import preview
from phi3_jax.data.pipeline import assemble
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.training.job import RunJob
from phi3_jax.training.step import EvalStep, Params

NAMED = 5  # rows that a message names
WORDS = 12  # tokens of each that it shows


class Suspects:
    """Looks among rows for those whose loss is not finite, each by itself and without dropout.

    Args:
        job: what the run works on.
        data: how rows become batches.
        eval_step: of `training.step.make_eval_step`.
        rows: the rows to look among.
        batch_size: sequences that `eval_step` is given at once.
    """

    def __init__(self, job: RunJob, data: DataSection, eval_step: EvalStep, rows: TokenizedRows, batch_size: int):
        self._job, self._data, self._eval_step = job, data, eval_step
        self._rows, self._batch_size = rows, batch_size

    def among(self, trainable: Params, sequences: Sequence[list[int]]) -> list[int]:
        """The rows in these sequences whose loss with the weights `trainable` is not finite."""
        bad = self._bad(trainable, sequences)
        # In a packed sequence one row's numbers spread to those after it, so they are looked at alone.
        if any(len(sequence) > 1 for sequence in bad):
            bad = self._bad(trainable, [[row] for sequence in bad for row in sequence])
        return list(itertools.chain.from_iterable(bad))

    def describe(self, trainable: Params, sequences: Sequence[list[int]]) -> str:
        """The same in words: where the rows stand, and how they begin."""
        everything = list(itertools.chain.from_iterable(sequences))
        bad = self.among(trainable, sequences)
        if not bad:
            return f"the loss of each of its {len(everything)} rows by itself is finite: {self._places(everything)}"
        if len(bad) == len(everything) > 1:
            return f"the loss of none of its {len(everything)} rows is: {self._places(everything)}"
        return f"the loss of {self._places(bad, WORDS)} is not"

    def _bad(self, trainable: Params, sequences: Sequence[list[int]]) -> list[list[int]]:
        bad, size = [], self._batch_size
        for start in range(0, len(sequences), size):
            part = list(sequences[start : start + size])
            here = self._job.devices.rows_here(size)
            batch = assemble(self._rows, part, self._data, batch_size=size, pad_id=self._job.pad_id, part=here)
            on_device = self._job.devices.put(batch, size)
            losses, _, _ = jax.device_get(self._eval_step(trainable, self._job.frozen, on_device))
            bad += [sequence for sequence, loss in zip(part, losses, strict=False) if not np.isfinite(loss)]
        return bad

    def _places(self, numbers: Sequence[int], words: int = 0) -> str:
        rows, tokenizer = self._rows, self._job.tokenizer
        begins = (f" ({preview(rows, tokenizer, row, tokens=words)})" if words else "" for row in numbers[:NAMED])
        places = ", ".join(f"{rows.where(row)}{begin}" for row, begin in zip(numbers[:NAMED], begins, strict=True))
        return f"{places} and {len(numbers) - NAMED} more" if len(numbers) > NAMED else places
