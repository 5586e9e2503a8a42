"""When a run writes a line, evaluates, saves and ends: its settings held against the steps done."""

import math
from dataclasses import dataclass

from phi3_jax.config.training import TrainingSection
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
        training = self.training
        if self.ended_at is not None:
            return self.ended_at
        if training.max_steps > 0:
            return training.max_steps
        assert self.epoch_steps is not None
        return math.ceil(self.epoch_steps * training.num_train_epochs)

    def is_last(self, progress: Progress) -> bool:
        """Whether all steps are done, or patience is over."""
        patience = self.training.early_stopping_patience
        return progress.step >= self.total_steps or (patience is not None and progress.waited >= patience)

    def line_is_due(self, step: int) -> bool:
        """Whether a line of metrics is."""
        return step % self.training.logging_steps == 0 or step == self.total_steps

    def evaluation_is_due(self, step: int) -> bool:
        """Whether an evaluation is."""
        last = step == self.total_steps
        return (
            step > 0
            and self.evaluates
            and self._is_due(self.training.eval_strategy, self.training.eval_steps, step, last)
        )

    def checkpoint_is_due(self, progress: Progress) -> bool:
        """Whether a checkpoint is."""
        last = self.is_last(progress)
        return self._is_due(self.training.save_strategy, self.training.save_steps, progress.step, last)

    def _is_due(self, strategy: str, steps: int | None, step: int, last: bool) -> bool:
        """Whether what happens every epoch, or every so many steps, and at the end, is due now."""
        every = self.epoch_steps if strategy == "epoch" else steps
        return strategy != "no" and (last or (every is not None and step % every == 0))
