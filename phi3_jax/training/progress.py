"""How far a run has come: what a checkpoint keeps of it beside arrays, and the results that follow from it."""

import time
from dataclasses import dataclass, field

from phi3_jax.training.evaluation import EvalFigures, value
from phi3_jax.training.metrics import Row
from phi3_jax.training.step import Window


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
        loss: summed over target tokens up to that line.
        tokens: up to that line, padding left out.
        target_tokens: up to that line.
        skipped: steps that were skipped, as far as the console told.
        evaluated_step: that of the last evaluation.
        best_step: that of the evaluation with the lowest loss.
        waited: evaluations since that one.
        evaluations: the figures `before` training, the `last` and the `best` ones.
        answers_before: to the run's prompts, before training.
    """

    step: int = 0
    rows: int = 0
    data: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    window_seconds: float = 0.0
    logged_step: int = 0
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

    def line(self, window: Window, epoch: float, learning_rate: float) -> Row:
        """The line of metrics for the steps since the last one, whose sums are `window` (on the host)."""
        row: Row = {"step": self.step, "epoch": epoch}
        if window.target_tokens:  # where all steps were skipped there is none
            row["loss"] = float(window.loss) / int(window.target_tokens)
        row["learning_rate"] = learning_rate
        if window.target_tokens:
            row["grad_norm"] = float(window.grad_norm)
        return row | {
            "skipped": self.skipped,
            "tokens": self.tokens + int(window.tokens),
            "target_tokens": self.target_tokens + int(window.target_tokens),
            "tokens_per_second": int(window.tokens) / self.window_seconds,
        }

    def close_window(self, window: Window) -> None:
        """Adds a window's sums, once its line is made."""
        self.loss += float(window.loss)
        self.tokens += int(window.tokens)
        self.target_tokens += int(window.target_tokens)
        self.window_seconds, self.logged_step = 0.0, self.step

    def rank(self) -> bool:
        """Whether the last evaluation's loss is the lowest so far."""
        last, best = self.evaluations["last"], self.evaluations.get("best")
        if best is not None and value(last, "eval_loss") >= value(best, "eval_loss"):
            self.waited += 1
            return False
        self.evaluations["best"], self.best_step, self.waited = last, self.step, 0
        return True

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
