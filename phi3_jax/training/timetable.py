"""When a run writes a line, evaluates, saves and ends: its settings held against the steps done."""

import math
from dataclasses import dataclass

from phi3_jax.config.ranges import MOST
from phi3_jax.config.training import TrainingSection
from phi3_jax.system.errors import InputError
from phi3_jax.training.progress import Progress


@dataclass(frozen=True)
class Timetable:
    """What is due after which step.

    Attributes:
        training: the settings.
        epoch_steps: steps of an epoch; None where nobody knows, and nothing is to happen by epochs.
        evaluates: whether there is anything to evaluate, and it is wanted.
        ended_at: the step after which there were no more rows; None where there are.
    """

    training: TrainingSection
    epoch_steps: int | None
    evaluates: bool
    ended_at: int | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless patience ends first."""
        return self._planned_steps if self.ended_at is None else self.ended_at

    @property
    def _planned_steps(self) -> int:
        training = self.training
        if training.max_steps > 0:
            return training.max_steps
        assert self.epoch_steps is not None
        steps = self.epoch_steps * training.num_train_epochs
        if steps > MOST:
            raise InputError(
                f"training.num_train_epochs is {training.num_train_epochs:g}, of {self.epoch_steps:,} steps each; "
                f"expected {MOST:,} steps together at most"
            )
        return math.ceil(steps)

    def is_last(self, progress: Progress) -> bool:
        """Whether all steps are done, or patience is over."""
        patience = self.training.early_stopping_patience
        return progress.step >= self.total_steps or (patience is not None and progress.waited >= patience)

    def line_is_due(self, step: int) -> bool:
        """Whether a line of metrics is."""
        training = self.training
        if step == 1 and training.logging_first_step:
            return True
        return self._is_due(training.logging_strategy, training.logging_steps, step, step == self.total_steps)

    def look_is_due(self, step: int) -> bool:
        """Whether to see how the device got on, which must not wait for lines that are far apart."""
        return self._is_due("steps", self.training.logging_steps, step, step == self.total_steps)

    def evaluation_is_due(self, step: int) -> bool:
        """Whether an evaluation is."""
        training, last = self.training, step == self.total_steps
        return (
            step > 0
            and self.evaluates
            and self._is_past(training.eval_delay, step)
            and self._is_due(training.eval_strategy, training.eval_steps, step, last)
        )

    def _is_past(self, delay: float, step: int) -> bool:
        if self.training.eval_strategy == "epoch" and self.epoch_steps is not None:
            return delay * self.epoch_steps <= step
        return delay <= step

    def checkpoint_is_due(self, progress: Progress, *, is_best: bool = False) -> bool:
        """Whether a checkpoint is, after an evaluation that was the best so far or not."""
        training = self.training
        if is_best and (training.save_strategy == "best" or training.load_best_model_at_end):
            return True
        if training.save_strategy == "best":
            return False
        return self._is_due(training.save_strategy, training.save_steps, progress.step, self.is_last(progress))

    def _is_due(self, strategy: str, steps: float | None, step: int, last: bool) -> bool:
        """Whether what happens every epoch, or every so many steps, and at the end, is due now."""
        every = self.epoch_steps if strategy == "epoch" else steps
        if every is not None and every < 1:
            every = math.ceil(self._planned_steps * every)
        return strategy != "no" and (last or (every is not None and step % every == 0))
