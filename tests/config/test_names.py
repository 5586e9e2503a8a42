"""The known name that a misspelt one was meant to be, or none."""

import pytest

from phi3_jax.config.names import did_you_mean, distance, nearest

KNOWN = ["seed", "eval_steps", "save_steps", "learning_rate", "per_device_batch_size", "adam_beta1", "top_k"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", "learning_rate"),
        ("learnign-rate", "learning_rate"),
        ("learn_rate", "learning_rate"),
        ("LEARNING_RATE", "learning_rate"),
        ("batch_size", "per_device_batch_size"),
        ("topk", "top_k"),
        ("sede", "seed"),
    ],
)
def test_by_letters_by_abbreviations_and_by_a_part(name, expected):
    assert nearest(name, KNOWN) == expected


@pytest.mark.parametrize("name", ["foo", "lr", "adam_beta2", "evil_stamps", "steps", "rate_of_learning", "", "_", "z"])
def test_what_is_like_nothing_or_like_several_is_not_guessed(name):
    assert nearest(name, KNOWN) is None
    assert did_you_mean(name, KNOWN) == ""


def test_letters_that_changed_places_are_one_slip():
    assert [distance("rogue", other) for other in ("rouge", "rogue", "bleu")] == [1, 0, 4]
