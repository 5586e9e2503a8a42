"""What the sections of a run's configuration contradict in each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_jax.errors import InputError

if TYPE_CHECKING:
    from phi3_jax.run_config import RunConfig


def check_evaluation(run: RunConfig) -> None:
    """Raises `InputError` where something needs evaluations, or their rows, that there are not."""
    training = run.training
    give_rows = "there are no evaluation rows; give data.eval or data.eval_fraction"
    if not run.data.has_eval:
        if training.eval_strategy == "epoch":
            raise InputError(f"training.eval_strategy is epoch, but {give_rows}")
        if training.eval_strategy == "steps" and training.eval_steps is not None:
            raise InputError(f"training.eval_steps is {training.eval_steps}, but {give_rows}")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        value = getattr(training, name)
        if not value:
            continue
        if not run.data.has_eval:
            raise InputError(f"training.{name} is {str(value).lower()}, but {give_rows}")
        if training.eval_strategy == "no" or (training.eval_strategy == "steps" and training.eval_steps is None):
            raise InputError(
                f"training.{name} is {str(value).lower()}, but nothing is evaluated before the end; "
                "give training.eval_steps, or training.eval_strategy epoch"
            )
    if training.load_best_model_at_end and training.save_strategy == "no":
        raise InputError(
            "training.load_best_model_at_end is true, but training.save_strategy is no; give steps or epoch"
        )


def check_adapter(run: RunConfig) -> None:
    """Raises `InputError` where the adapter's settings do not go with the base or the optimizer."""
    start, quantization = run.peft.init_lora_weights, run.model.quantization
    if start == "loftq" and quantization is None:
        raise InputError(
            "peft.init_lora_weights is loftq, which starts from what quantisation loses, but model.quantization is "
            "none; give nf4"
        )
    if str(start).startswith("pissa") and quantization is not None:
        raise InputError(
            f"peft.init_lora_weights is {start}, which takes the base's largest directions before it is rounded, "
            f"but model.quantization is {quantization}; leave quantization out, or give loftq"
        )
    if run.peft.full_finetuning and run.model.quantization is not None:
        raise InputError(
            f"model.quantization is {run.model.quantization}, but peft.full_finetuning trains the base's own "
            "weights, and rounded ones cannot; leave one out"
        )
    if run.peft.full_finetuning and run.peft.init_from is not None:
        raise InputError(
            f"peft.init_from is {run.peft.init_from}, but peft.full_finetuning trains no adapter; leave one out"
        )
    training = run.training
    for name, given in (("optim", training.optim == "lorafa"), ("loraplus_lr_ratio", training.loraplus_lr_ratio)):
        if run.peft.full_finetuning and given:
            raise InputError(
                f"training.{name} is {getattr(training, name)}, but peft.full_finetuning trains no adapter; "
                "leave one out"
            )
