"""Runs of TRL's SFTTrainer beside ours: what every step of both took."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import trl
from transformers import TrainerCallback

from phi3_jax.config.run import RunConfig
from phi3_jax.training.loop import train
from tests.helpers.runs import metrics


class Recorder(trl.SFTTrainer):
    """Keeps the loss of every forward pass as it is (the log rounds it), and how many tokens it is trained on."""

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        targets = int((inputs["labels"][:, 1:] != -100).sum())
        loss = super().training_step(model, inputs, *arguments, **named)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        self.targets = [*getattr(self, "targets", []), targets]
        return loss


@dataclass
class Steps(TrainerCallback):
    """What each optimizer step of a run took.

    Attributes:
        losses: Of all its target tokens.
        rates: The learning rate that it was taken with.
        targets: How many tokens it was trained on.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    trainer: Any = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.seen, self.trainer.targets = [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.losses.append(sum(self.trainer.seen))
        self.targets.append(sum(self.trainer.targets))


def steps_of_trl(model: Any, args: Any, **given: Any) -> Steps:
    """Trains to the end."""
    steps = Steps()
    steps.trainer = Recorder(model, args, callbacks=[steps], **given)
    steps.trainer.train()
    return steps


def our_steps(run: RunConfig, folder: Any) -> Steps:
    """The same of a run, which logs every step."""
    train(run)
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    targets = np.diff([0, *(line["target_tokens"] for line in lines)]).tolist()
    return Steps([line["loss"] for line in lines], [line["learning_rate"] for line in lines], targets)
