"""How far a run has come: what a checkpoint keeps of it beside arrays, and the results that follow from it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a checkpoint says beside its arrays: plain values, kept as JSON.

    **Fields**: `rows`, lines of metrics.jsonl so far; `data`, state of the data iterator; `seconds`,
    spent on steps; `logged_step`, that of the last line, and `window_seconds` since; `loss`, summed
    over `target_tokens` up to that line; `skipped`, steps that were skipped, as far as the console told;
    `evaluated_step`, that of the last evaluation; `waited`, evaluations since the lowest loss; `evaluations`,
    the figures `before` training, the `last` and the `best` ones.
    """

    step: int = 0
    rows: int = 0
    data: Any = None
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
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers_before: list[str] = field(default_factory=list)

    def results(self, epoch_steps: int, rows: int) -> dict[str, Any]:
        """The figures of training for train_results.json, under the names of transformers' example scripts.

        **Arguments**: `epoch_steps`, steps of an epoch; `rows`, of the training set.
        """
        seconds = max(self.seconds, 1e-9)
        return {
            "epoch": self.step / epoch_steps,
            "global_step": self.step,
            "train_loss": self.loss / max(1, self.target_tokens),
            "train_runtime": self.seconds,
            "train_samples": rows,
            "train_steps_per_second": self.step / seconds,
            "train_tokens": self.tokens,
            "train_target_tokens": self.target_tokens,
            "train_tokens_per_second": self.tokens / seconds,
        }
