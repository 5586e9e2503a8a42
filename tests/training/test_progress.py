"""How far a run has come."""

import jax.numpy as jnp
import pytest

from phi3_jax.config.training import TrainingSection
from phi3_jax.training.progress import Progress
from phi3_jax.training.step import Window


def test_results_are_per_target_token_and_per_second():
    results = Progress(step=6, seconds=2.0, loss=30.0, target_tokens=10, tokens=40).results(epoch=1.5, rows=16)
    assert results["epoch"] == 1.5
    assert results["train_loss"] == 3
    assert (results["train_steps_per_second"], results["train_tokens_per_second"]) == (3, 20)
    assert Progress().results(epoch=1.5, rows=16)["train_loss"] == 0


def test_a_line_is_of_all_sums_since_the_last_one_however_often_they_were_taken():
    progress = Progress(step=4, seconds=2.0, window_seconds=2.0, tokens=100)
    progress.collect(Window(*map(jnp.asarray, (6.0, 2, 10, 30.0, 0.5))))
    progress.collect(Window(*map(jnp.asarray, (0.0, 0, 10, 30.0, 0.0))))  # all its steps were skipped
    row = progress.line(epoch=1.0, learning_rate=0.1)
    assert (row["loss"], row["grad_norm"], row["tokens"], row["tokens_per_second"]) == (3, 0.5, 120, 10)
    progress.close_window()
    assert (progress.loss, progress.tokens, progress.window, progress.logged_step) == (6, 120, {}, 4)


@pytest.mark.parametrize(
    ("settings", "values", "best", "waited"),
    [
        ({}, [3.0, 2.0, 2.0, 2.5], 2, 2),
        ({"greater_is_better": True}, [3.0, 2.0, 4.0], 3, 0),
        ({"early_stopping_patience": 3, "early_stopping_threshold": 0.5}, [3.0, 2.6, 2.2, 1.0, 0.9], 5, 1),
        ({"metric_for_best_model": "eval_loss"}, [3.0, 2.0], 2, 0),
    ],
)
def test_which_evaluation_is_the_best_and_how_long_none_was_better(settings, values, best, waited):
    progress, training = Progress(), TrainingSection(**settings)
    for progress.step, loss in enumerate(values, 1):
        progress.evaluations["last"] = {"eval_loss": loss}
        assert progress.rank(training) == (progress.best_step == progress.step)
    assert (progress.best_step, progress.waited) == (best, waited)
    assert progress.evaluations["best"] == {"eval_loss": values[best - 1]}


@pytest.mark.parametrize("metric", ["chats_token_accuracy", "eval_chats_mean_token_accuracy"])
def test_of_an_accuracy_more_is_better(metric):
    progress, training = Progress(step=1), TrainingSection(metric_for_best_model=metric)
    found = []
    for accuracy in (0.5, 0.7, 0.6):
        progress.evaluations["last"] = {"eval_loss": 1 - accuracy, "eval_chats_token_accuracy": accuracy}
        found.append(progress.rank(training))
    assert found == [True, True, False]
