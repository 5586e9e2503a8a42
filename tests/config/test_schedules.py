"""Settings of schedules: those that a schedule has, of the right kind, and what it cannot do without."""

import pytest

from phi3_jax import InputError
from phi3_jax.config.schedules import CosineWithMinLr, WarmupStableDecay, schedule_settings


def test_what_is_not_given_is_transformers_default():
    assert schedule_settings("cosine_with_min_lr", {"min_lr": 1e-6}, 1e-4) == CosineWithMinLr(0.5, 1e-6, None)
    found = schedule_settings("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": None}, 1e-4)
    assert found == WarmupStableDecay(5)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("linear", {"num_cycles": 2}, "has num_cycles, and linear takes no settings"),
        ("polynomial", {"lr_ende": 0}, "has lr_ende, and polynomial takes lr_end, power"),
        ("cosine_with_restarts", {"num_cycles": "3"}, "num_cycles is '3', expected a number of at least 0"),
        ("cosine_with_restarts", {"num_cycles": True}, "num_cycles is True, expected a number"),
        ("cosine_with_restarts", {"num_cycles": float("nan")}, "num_cycles is nan, expected a number"),
        ("cosine_with_restarts", {"num_cycles": None}, "num_cycles is None, expected a number"),
        ("inverse_sqrt", {"timescale": 0}, "timescale is 0, expected a whole number of at least 1"),
        ("inverse_sqrt", {"timescale": 2.5}, "timescale is 2.5, expected a whole number"),
        ("cosine_with_min_lr", {}, "has neither min_lr nor min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "min_lr 1e-06 and min_lr_rate 0.1; leave one"),
        ("warmup_stable_decay", {}, "has no num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": None}, "num_decay_steps is None, expected a whole number"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 3, "decay_type": "sqrt"},
            "decay_type is 'sqrt', expected one of linear, cosine, 1-sqrt",
        ),
        ("polynomial", {"lr_end": 1e-3}, "lr_end is 0.001, to which training.learning_rate 0.0001 cannot fall"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(name, kwargs, message):
    with pytest.raises(InputError, match=f"^training.lr_scheduler_kwargs.*{message}"):
        schedule_settings(name, kwargs, 1e-4)


def test_a_least_learning_rate_of_none():
    with pytest.raises(InputError, match="min_lr is 1e-06, but training.learning_rate is 0"):
        schedule_settings("cosine_with_min_lr", {"min_lr": 1e-6}, 0.0)
