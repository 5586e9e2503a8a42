"""When lines, evaluations and checkpoints are due, and when a run ends."""

import pytest

from phi3_jax.config.training import TrainingSection
from phi3_jax.training.progress import Progress
from phi3_jax.training.timetable import Timetable


def timetable(evaluates: bool = True, **training) -> Timetable:
    return Timetable(TrainingSection(**{"max_steps": 10, **training}), epoch_steps=4, evaluates=evaluates)


@pytest.mark.parametrize(("settings", "steps"), [({}, 10), ({"max_steps": -1, "num_train_epochs": 2.5}, 10)])
def test_steps_of_the_whole_run(settings, steps):
    assert timetable(**settings).total_steps == steps


def test_what_is_due_every_so_many_steps_is_due_at_the_end_too():
    plan = timetable(logging_steps=3, eval_strategy="steps", eval_steps=4, save_strategy="epoch")
    steps = range(11)
    assert [step for step in steps if plan.line_is_due(step)] == [0, 3, 6, 9, 10]
    assert [step for step in steps if plan.evaluation_is_due(step)] == [4, 8, 10]
    assert [step for step in steps if step and plan.checkpoint_is_due(Progress(step=step))] == [4, 8, 10]


def test_nothing_is_due_that_is_not_wanted():
    plan = timetable(evaluates=False, eval_strategy="steps", eval_steps=1, save_strategy="no")
    assert not any(plan.evaluation_is_due(step) or plan.checkpoint_is_due(Progress(step=step)) for step in range(11))


def test_patience_ends_a_run_and_its_last_checkpoint_is_due():
    plan = timetable(eval_steps=1, save_steps=100, load_best_model_at_end=False, early_stopping_patience=2)
    assert not plan.is_last(Progress(step=5, waited=1))
    assert plan.is_last(Progress(step=5, waited=2))
    assert plan.checkpoint_is_due(Progress(step=5, waited=2))
    assert not plan.checkpoint_is_due(Progress(step=5, waited=1))
