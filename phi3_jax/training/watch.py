"""Looks after the steps that the device skipped: names them, with the rows and the layer to blame."""

from collections.abc import Callable

import jax

from phi3_jax.config.run import RunConfig
from phi3_jax.data.pipeline import Batches
from phi3_jax.data.rows import TokenizedRows
from phi3_jax.data.streaming import StreamedBatches
from phi3_jax.training.debug_nans import find_nonfinite
from phi3_jax.training.job import RunJob
from phi3_jax.training.nonfinite import KEPT, Skips
from phi3_jax.training.step import EvalStep, TrainState
from phi3_jax.training.suspects import Suspects


class Watch:
    """Looks after a run's skipped steps.

    Args:
        run: its settings.
        job: what it works on.
        batches: those of the steps.
        eval_step: of `training.step.make_eval_step`.
        say: what takes lines for the console.
    """

    def __init__(
        self,
        run: RunConfig,
        job: RunJob,
        batches: Batches | StreamedBatches,
        eval_step: EvalStep,
        say: Callable[[str], None],
    ):
        self._job, self._batches, self._training, self._say = job, batches, run.training, say
        self._batch_size = job.devices.batch_size(run.training.per_device_train_batch_size)
        self._data, self._eval_step = run.data, eval_step

    def look(self, state: TrainState, told: int) -> Skips:
        """What was skipped so far, on the host; says a line for each step skipped after the first `told`."""
        skips: Skips = jax.device_get(state.skips)
        if int(skips.total) - told > KEPT:
            self._say(f"warning: {int(skips.total) - told} steps were skipped; the last {KEPT} of them:")
        for step in skips.since(told):
            why, layer = "its rows are no longer in memory", ""
            if (found := self._batches.step_rows(step)) is not None:
                rows, sequences = found
                why = self._suspects(rows).describe(state.trainable, sequences)
                if self._training.debug_nans:
                    layer = f"; the first that is not finite: {self._layer(state, step)}"
            self._say(f"warning: step {step + 1} was skipped, its loss or gradient is not finite; {why}{layer}")
        return skips

    def is_good(self, state: TrainState, step: int) -> bool:
        """Whether the rows of that step, counted from 0, have finite losses with the weights as they are."""
        found = self._batches.step_rows(step)
        return found is not None and not self._suspects(found[0]).among(state.trainable, found[1])

    def _suspects(self, rows: TokenizedRows) -> Suspects:
        return Suspects(self._job, self._data, self._eval_step, rows, self._batch_size)

    def _layer(self, state: TrainState, step: int) -> str:
        """The step's micro-batches once more, with the randomness that they had."""
        batch = self._job.devices.put(self._batches.batch_of(step), self._batch_size)
        model, lora = self._job.model_and_lora(state.trainable)
        key = jax.random.fold_in(state.key, step)
        for index in range(self._training.gradient_accumulation_steps):
            micro = {name: array[index] for name, array in batch.items()}
            micro_key = jax.random.fold_in(key, index)
            found = find_nonfinite(model, lora, micro, micro_key, neftune_alpha=self._training.neftune_noise_alpha)
            if found is not None:
                return found
        return "none of its micro-batches by itself, but their sum or the gradient's norm"
