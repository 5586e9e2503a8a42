"""What the section of training says of itself."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.training import TrainingSection


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 10**21}, "training.max_steps is 1,000,000,000,000,000,000,000, expected at most"),
        ({"output_dir": ""}, "training.output_dir is empty, expected a folder"),
        ({"max_steps": 0}, "training.max_steps is 0, expected at least 1, or -1 to train by epochs"),
        ({"num_train_epochs": 0}, "training.num_train_epochs is 0 and training.max_steps -1: nothing to train"),
        ({"loraplus_lr_embedding": 1e-5}, "training.loraplus_lr_embedding is 1e-05, but without LoRA"),
        ({"early_stopping_threshold": 0.1}, "threshold is 0.1, but without .*; give training.early_stopping_patience"),
        ({"metric_for_best_model": "accuracy"}, "is accuracy, but evaluations measure loss, perplexity, token_accu"),
        ({"resume_from_checkpoint": ""}, "training.resume_from_checkpoint is empty"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 0}},
            "lr_scheduler_kwargs has min_lr, and cosine takes num_cycles",
        ),
        ({"logging_steps": 2.5}, "training.logging_steps is 2.5, expected a whole number of at least 1, or below 1"),
        ({"save_steps": 0}, "training.save_steps is 0, expected a whole number"),
        ({"warmup_steps": -1}, "training.warmup_steps is -1, expected a whole number of at least 0"),
        ({"eval_steps": float("nan")}, "training.eval_steps is nan, expected a whole number"),
        ({"loraplus_lr_ratio": 16, "optim": "lorafa"}, "training.loraplus_lr_ratio is 16, but training.optim lorafa"),
    ],
)
def test_what_cannot_be_is_refused_with_both_names(values, message):
    with pytest.raises(InputError, match=message):
        TrainingSection(**values)


def test_what_is_written_in_several_ways_is_kept_in_one():
    training = TrainingSection(logging_steps=5.0, eval_steps=0.1, save_total_limit=0, output_dir="~/out")
    assert (training.logging_steps, type(training.logging_steps), training.eval_steps) == (5, int, 0.1)
    assert training.save_total_limit is TrainingSection(save_total_limit=-1).save_total_limit is None
    assert "~" not in training.output_dir


@pytest.mark.parametrize(
    ("given", "metric", "more"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "eval_perplexity"}, "eval_perplexity", False),
        ({"metric_for_best_model": "code_loss"}, "eval_code_loss", False),
        ({"metric_for_best_model": "eval_mean_token_accuracy"}, "eval_token_accuracy", True),
        ({"metric_for_best_model": "token_accuracy", "greater_is_better": False}, "eval_token_accuracy", False),
    ],
)
def test_what_evaluations_are_compared_by(given, metric, more):
    training = TrainingSection(**given)
    assert (training.best_metric, training.more_is_better) == (metric, more)
