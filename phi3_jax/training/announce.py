"""What a run says of itself before its first step."""

from collections.abc import Callable

import jax

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.config.schedules import WarmupStableDecay
from phi3_jax.config.sections import PeftSection
from phi3_jax.config.training import TrainingSection
from phi3_jax.data import preview
from phi3_jax.data.run_data import first_rows
from phi3_jax.lora import format_parameter_table
from phi3_jax.optim.schedule import factor, warmup_steps
from phi3_jax.parallel.mesh import describe_mesh
from phi3_jax.system.text import counted
from phi3_jax.training.job import RunJob
from phi3_jax.training.timetable import Timetable


def announce(run: RunConfig, job: RunJob, timetable: Timetable, batch_size: int, say: Callable[[str], None]) -> None:
    """Says what trains on what, in how many steps, and which settings come to nothing.

    Args:
        run: The settings.
        job: What the run works on.
        timetable: When what is due.
        batch_size: Rows of a forward pass, over all devices.
        say: What takes lines for the console.
    """
    training = run.training
    epoch = f" ({timetable.epoch_steps} an epoch)" if timetable.epoch_steps is not None else ""
    rows = batch_size * training.gradient_accumulation_steps
    say(format_parameter_table(job.table))
    say(job.data.summary())
    say(f"first row, targets in ⟦⟧: {preview(first_rows(job.data.train), job.tokenizer)}")
    if jax.device_count() > 1:  # of one the first line has said all
        say(describe_mesh(job.devices.mesh))
    say(
        f"{counted(timetable.total_steps, 'step')} of {counted(rows, 'row')}{epoch}, "
        f"{training.optim}, learning rate {training.learning_rate:g} {training.lr_scheduler_type}"
        + "".join(f", {name} {value}" for name, value in (training.lr_scheduler_kwargs or {}).items())
    )
    if unused := [*unused_settings(training), *unused_in_peft(run.peft, job.config)]:
        say(f"not used: {'; '.join(unused)}")
    for line in warnings(training, timetable):
        say(f"warning: {line}")


def warnings(training: TrainingSection, timetable: Timetable) -> list[str]:
    """What is allowed, and seldom meant.

    Args:
        training: The settings.
        timetable: When what is due.
    """
    total, found = timetable.total_steps, []
    settings, warmup = training.schedule, warmup_steps(training, total)
    rises = training.lr_scheduler_type != "constant" and factor(settings, 0, warmup, total, 1.0) == 0
    if total == 1 and rises and training.learning_rate > 0:
        found.append(
            "the only step has learning rate 0, with which the warm-up begins: nothing will be learnt; take more "
            "(training.num_train_epochs, data.packing false), or set training.warmup_ratio 0"
        )
    if isinstance(settings, WarmupStableDecay):
        needed = warmup + (settings.num_stable_steps or 0) + settings.num_decay_steps
        if needed > total:
            found.append(
                f"training.lr_scheduler_kwargs and the warm-up ask for {needed} steps, and there are {total}, so that "
                "the learning rate never has its whole course"
            )
    if timetable.evaluates and not timetable.evaluation_is_due(total):
        found.append(f"training.eval_delay is {training.eval_delay:g}, before which the run ends: nothing is evaluated")
    if training.greater_is_better and training.best_metric.endswith(("loss", "perplexity")):
        found.append(
            f"training.greater_is_better is true, so that the evaluation with the highest {training.best_metric} is "
            "taken for the best"
        )
    return found


def unused_settings(training: TrainingSection) -> list[str]:
    """Settings that others make meaningless, where they are not the defaults, each with the reason.

    Example:
        >>> unused_settings(TrainingSection(max_steps=20, num_train_epochs=3))
        ['training.num_train_epochs 3, since training.max_steps is 20']
    """
    default, found = TrainingSection(), []

    def because(meaningless: bool, names: str, reason: str) -> None:
        for name in names.split():
            value = getattr(training, name)
            if meaningless and value != getattr(default, name):
                found.append(f"training.{name} {value}, since training.{reason} is {getattr(training, reason)}")

    because(training.max_steps > 0, "num_train_epochs", "max_steps")
    because(training.lr_scheduler_type == "constant", "warmup_ratio warmup_steps", "lr_scheduler_type")
    because(training.warmup_steps > 0, "warmup_ratio", "warmup_steps")
    for what in ("logging", "eval", "save"):
        because(getattr(training, f"{what}_strategy") != "steps", f"{what}_steps", f"{what}_strategy")
    because(training.eval_strategy == "no", "eval_delay", "eval_strategy")
    because(not training.gradient_checkpointing, "remat_policy", "gradient_checkpointing")
    because(training.optim in ("sgd", "adafactor"), "adam_beta1 adam_beta2", "optim")
    because(training.optim in ("sgd", "adafactor", "lion"), "adam_epsilon", "optim")
    return found


def unused_in_peft(peft: PeftSection, config: Phi3Config) -> list[str]:
    """Settings of the adapter that change nothing for this model, each with the reason.

    Args:
        peft: The settings.
        config: The model's.
    """
    found = []
    if peft.bias != "none":
        found.append(f"peft.bias {peft.bias}, since Phi-3 has no biases, so that nothing more trains")
    if peft.ensure_weight_tying:
        why = "neither trains" if config.tie_word_embeddings else "they share no table in this model"
        found.append(f"peft.ensure_weight_tying true, which is about embedding and output head, and {why}")
    return found
