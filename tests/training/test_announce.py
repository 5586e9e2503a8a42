"""What a run says of its settings before the first step."""

import pytest

from phi3_jax.config.sections import PeftSection
from phi3_jax.config.training import TrainingSection
from phi3_jax.training.announce import unused_in_peft, unused_settings, warnings
from phi3_jax.training.timetable import Timetable
from tests.helpers.models import tiny_model


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, []),
        (
            {"eval_strategy": "epoch", "eval_steps": 50},
            ["training.eval_steps 50, since training.eval_strategy is epoch"],
        ),
        ({"save_strategy": "best", "save_steps": 50}, ["training.save_steps 50, since training.save_strategy is best"]),
        (
            {"warmup_steps": 5, "warmup_ratio": 0.1, "lr_scheduler_type": "linear"},
            ["training.warmup_ratio 0.1, since training.warmup_steps is 5"],
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            ["training.warmup_ratio 0.1, since training.lr_scheduler_type is constant"],
        ),
        (
            {"gradient_checkpointing": False, "remat_policy": "dots"},
            ["training.remat_policy dots, since training.gradient_checkpointing is False"],
        ),
        ({"optim": "sgd", "adam_beta2": 0.95}, ["training.adam_beta2 0.95, since training.optim is sgd"]),
    ],
)
def test_what_is_not_used_is_named_with_the_setting_that_makes_it_so(settings, told):
    assert unused_settings(TrainingSection(**settings)) == told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 1}, "the only step has learning rate 0"),
        ({"max_steps": 10, "eval_delay": 11}, "training.eval_delay is 11, before which the run ends"),
        ({"max_steps": 10, "greater_is_better": True}, "training.greater_is_better is true"),
        (
            {
                "max_steps": 10,
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 3,
                "lr_scheduler_kwargs": {"num_decay_steps": 8},
            },
            "ask for 11 steps, and there are 10",
        ),
    ],
)
def test_what_is_seldom_meant_is_warned_of(settings, words):
    (warning,) = warnings(TrainingSection(**settings), Timetable(TrainingSection(**settings), None, evaluates=True))
    assert words in warning


def test_nothing_is_warned_of_that_is_as_usual():
    training = TrainingSection(max_steps=100, metric_for_best_model="token_accuracy", greater_is_better=True)
    assert warnings(training, Timetable(training, None, evaluates=True)) == []


@pytest.mark.parametrize(("tied", "why"), [(False, "they share no table in this model"), (True, "neither trains")])
def test_settings_of_peft_that_change_nothing_are_named(tied, why):
    config = tiny_model(layers=1, tie_word_embeddings=tied).config
    assert unused_in_peft(PeftSection(), config) == []
    bias, tying = unused_in_peft(PeftSection(bias="lora_only", ensure_weight_tying=True), config)
    assert bias == "peft.bias lora_only, since Phi-3 has no biases, so that nothing more trains"
    assert tying == f"peft.ensure_weight_tying true, which is about embedding and output head, and {why}"
