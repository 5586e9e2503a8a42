"""When lines, evaluations and checkpoints are due, and when a run ends."""

from types import SimpleNamespace

import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.config.training import TrainingSection
from phi3_jax.data.pipeline import train_batches
from phi3_jax.system.errors import InputError
from phi3_jax.training.progress import Progress
from phi3_jax.training.timetable import Timetable
from tests.helpers.rows import make_rows


def timetable(evaluates: bool = True, **training) -> Timetable:
    return Timetable(TrainingSection(**{"max_steps": 10, **training}), epoch_steps=4, evaluates=evaluates)


@pytest.mark.parametrize(("settings", "steps"), [({}, 10), ({"max_steps": -1, "num_train_epochs": 2.5}, 10)])
def test_steps_of_the_whole_run(settings, steps):
    assert timetable(**settings).total_steps == steps


def test_more_steps_than_can_be_counted_are_refused():
    with pytest.raises(InputError, match=r"num_train_epochs is 1e\+30, of 4 steps each; expected 2,147,483,647 steps"):
        _ = timetable(max_steps=-1, num_train_epochs=1e30).total_steps


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


def test_steps_below_1_are_a_share_of_all_rounded_up():
    plan = timetable(logging_steps=0.25, eval_steps=0.15, save_steps=0.5)
    steps = range(1, 11)
    assert [step for step in steps if plan.line_is_due(step)] == [3, 6, 9, 10]
    assert [step for step in steps if plan.evaluation_is_due(step)] == [2, 4, 6, 8, 10]
    assert [step for step in steps if plan.checkpoint_is_due(Progress(step=step))] == [5, 10]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
        ({"logging_strategy": "epoch"}, [4, 8, 10]),
        ({"logging_strategy": "epoch", "logging_first_step": True}, [1, 4, 8, 10]),
    ],
)
def test_lines_by_strategy_and_a_look_at_the_device_every_so_many_steps(settings, lines):
    plan = timetable(**settings, logging_steps=5)
    assert [step for step in range(1, 11) if plan.line_is_due(step)] == lines
    assert [step for step in range(1, 11) if plan.look_is_due(step)] == [5, 10]


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({"eval_steps": 3, "eval_delay": 6}, [6, 9, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 2.1}, [10]),
        ({"eval_steps": 3, "eval_delay": 11}, []),
    ],
)
def test_evaluations_before_the_delay_are_left_out(settings, evaluations):
    assert [step for step in range(1, 11) if timetable(**settings).evaluation_is_due(step)] == evaluations


def test_with_best_a_checkpoint_is_due_after_the_best_evaluation_alone():
    plan = timetable(save_strategy="best", save_steps=1)
    assert not any(plan.checkpoint_is_due(Progress(step=step)) for step in range(11))
    assert plan.checkpoint_is_due(Progress(step=3), is_best=True)
    assert not timetable(save_steps=2).checkpoint_is_due(Progress(step=3), is_best=True)
    assert timetable(save_steps=2, load_best_model_at_end=True).checkpoint_is_due(Progress(step=3), is_best=True)


@pytest.mark.parametrize(("rows", "size", "accumulation"), [(1, 4, 2), (5, 1, 1), (7, 2, 3), (8, 4, 2), (33, 2, 3)])
@pytest.mark.parametrize("epochs", [0.3, 1.5, 2.999, 3])
def test_a_run_has_as_many_steps_as_transformers_trainer_takes(rows, size, accumulation, epochs):
    torch = pytest.importorskip("torch")
    from transformers import Trainer

    training = TrainingSection(
        num_train_epochs=epochs, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    data = DataSection(packing=False, max_length=8)
    ours = train_batches(
        make_rows([1] * rows),
        data,
        batch_size=size,
        accumulation=accumulation,
        epochs=None,
        seed=0,
        pad_id=0,
    )
    theirs = Trainer.set_initial_training_values(
        SimpleNamespace(get_total_train_batch_size=lambda _: 1, get_sp_size=lambda: 1, num_examples=lambda _: rows),
        training,
        torch.utils.data.DataLoader(range(rows), batch_size=size),
    )
    assert Timetable(training, ours.steps_per_epoch, evaluates=False).total_steps == theirs[6]
    assert ours.steps_per_epoch == theirs[1]
    ours.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 3, "eval_steps": 4, "save_steps": 5},
        {"logging_steps": 0.1, "eval_steps": 0.26, "save_steps": 0.5, "logging_first_step": True, "eval_delay": 6},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch", "eval_delay": 1.5},
        {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "logging_first_step": True},
        {"eval_steps": 3, "save_strategy": "best"},
    ],
)
@pytest.mark.parametrize("total", [1, 7, 8, 11])
def test_what_is_due_is_due_after_the_steps_of_transformers(settings, total):
    """But for a line of metrics at the end, which there is always unless nothing is to be logged."""
    callbacks = pytest.importorskip("transformers.trainer_callback")
    training = TrainingSection(**{"max_steps": total, "eval_steps": 1, **settings})
    plan, flow = Timetable(training, epoch_steps=4, evaluates=True), callbacks.DefaultFlowCallback()
    state = callbacks.TrainerState(max_steps=total)
    state.compute_steps(training, total)
    for step in range(1, total + 1):
        state.global_step, state.epoch, control = step, step / 4, callbacks.TrainerControl()
        flow.on_step_end(training, state, control)
        if step % 4 == 0 or step == total:
            flow.on_epoch_end(training, state, control)
        line = control.should_log or (step == total and training.logging_strategy != "no")
        assert plan.line_is_due(step) == line
        assert plan.evaluation_is_due(step) == control.should_evaluate
        assert plan.checkpoint_is_due(Progress(step=step)) == control.should_save
