"""How far a run has come: what a checkpoint keeps of it beside arrays, and the results that follow from it."""

import math
import time
from dataclasses import dataclass, field

from phi3_jax.config.training import TrainingSection
from phi3_jax.training.evaluation import EvalFigures, value
from phi3_jax.training.metrics import Row
from phi3_jax.training.step import Window


def rank_of(figures: EvalFigures, training: TrainingSection) -> float:
    """What orders evaluations, the best one lowest: the figure that `training` says, or less that.

    Args:
        figures: Those of an evaluation, the one that is wanted among them.
        training: The settings.

    Example:
        >>> rank_of({"eval_token_accuracy": 0.9}, TrainingSection(metric_for_best_model="token_accuracy"))
        -0.9
    """
    found = value(figures, training.best_metric)
    return -found if training.more_is_better else found


class Stopwatch:
    """Counts seconds while it runs."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        """Starts it, from 0."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """The seconds since the start, 0 where it does not run."""
        since, self._since = self._since, None
        return 0.0 if since is None else time.perf_counter() - since


@dataclass
class Progress:
    """What a checkpoint says beside its arrays: plain values, kept as JSON.

    Attributes:
        step: steps done.
        rows: lines of metrics.jsonl so far.
        data: state of the data iterator.
        seconds: spent on steps.
        window_seconds: those since the last line.
        logged_step: the step of the last line.
        window: sums since that line, as far as they were taken from the device.
        loss: summed over target tokens up to that line.
        tokens: up to that line, padding left out.
        target_tokens: up to that line.
        skipped: steps that were skipped, as far as the console told.
        evaluated_step: that of the last evaluation.
        best_step: that of the best evaluation.
        waited: evaluations since one was better by more than the threshold.
        evaluations: the figures `before` training, the `last` and the `best` ones.
        answers_before: to the run's prompts, before training.
    """

    step: int = 0
    rows: int = 0
    data: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    window_seconds: float = 0.0
    logged_step: int = 0
    window: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    tokens: int = 0
    target_tokens: int = 0
    skipped: int = 0
    evaluated_step: int = 0
    best_step: int | None = None
    waited: int = 0
    evaluations: dict[str, EvalFigures] = field(default_factory=dict)
    answers_before: list[str] = field(default_factory=list)

    def spend(self, seconds: float) -> None:
        """Counts time spent on steps."""
        self.seconds += seconds
        self.window_seconds += seconds

    def collect(self, window: Window) -> None:
        """Takes sums over from the device, where they would grow without end (`window` is on the host)."""
        sums = self.window or {"loss": 0.0, "target_tokens": 0, "tokens": 0, "attended": 0.0, "grad_norm": 0.0}
        sums["loss"] += float(window.loss)
        sums["target_tokens"] += int(window.target_tokens)
        sums["tokens"] += int(window.tokens)
        sums["attended"] += float(window.attended)
        if window.target_tokens:  # else all steps were skipped
            sums["grad_norm"] = float(window.grad_norm)
        self.window = sums

    def line(self, epoch: float, learning_rate: float) -> Row:
        """The line of metrics for the steps since the last one."""
        row: Row = {"step": self.step, "epoch": epoch}
        sums = self.window
        if sums["target_tokens"]:
            row["loss"] = sums["loss"] / sums["target_tokens"]
        row["learning_rate"] = learning_rate
        if sums["target_tokens"]:
            row["grad_norm"] = sums["grad_norm"]
        return row | {
            "skipped": self.skipped,
            "tokens": self.tokens + sums["tokens"],
            "target_tokens": self.target_tokens + sums["target_tokens"],
            "tokens_per_second": sums["tokens"] / self.window_seconds,
        }

    def close_window(self) -> None:
        """Adds the window's sums, once its line is made."""
        self.loss += self.window["loss"]
        self.tokens += int(self.window["tokens"])
        self.target_tokens += int(self.window["target_tokens"])
        self.window, self.window_seconds, self.logged_step = {}, 0.0, self.step

    def rank(self, training: TrainingSection) -> bool:
        """Whether the last evaluation is the best so far.

        As in transformers an evaluation that is better by less than `early_stopping_threshold` is the best one, and
        uses up patience all the same.
        """
        best = self.evaluations.get("best")
        gain = math.inf
        if best is not None:
            gain = rank_of(best, training) - rank_of(self.evaluations["last"], training)
        self.waited = 0 if gain > training.early_stopping_threshold else self.waited + 1
        if gain > 0:
            self.evaluations["best"], self.best_step = self.evaluations["last"], self.step
        return gain > 0

    def results(self, epoch: float, rows: int) -> Row:
        """The figures of training for train_results.json, under the names of transformers' example scripts.

        Args:
            epoch: how often the rows have come.
            rows: rows of the training set.
        """
        seconds = max(self.seconds, 1e-9)
        return {
            "epoch": epoch,
            "global_step": self.step,
            "train_loss": self.loss / max(1, self.target_tokens),
            "train_runtime": self.seconds,
            "train_samples": rows,
            "train_steps_per_second": self.step / seconds,
            "train_tokens": self.tokens,
            "train_target_tokens": self.target_tokens,
            "train_tokens_per_second": self.tokens / seconds,
        }
