"""What a model makes of the evaluation set."""

import pytest

from phi3_jax.training.evaluation import choose_prompts, exact_match


def test_prompts_that_are_too_long_or_empty_are_left_out():
    prompts = [([1] * length, str(length)) for length in (0, 5, 2, 9, 3)]
    assert [reference for _, reference in choose_prompts(prompts, 2, 5)] == ["5", "2"]


def test_space_around_an_answer_is_no_difference():
    prompts = [([1], " yes "), ([1], "no"), ([1], "maybe"), ([1], "so")]
    figures = exact_match(["yes", "nope", "maybe", "So"], prompts)
    assert figures["exact_match"] == pytest.approx(0.5)
    low, high = figures["exact_match_interval"]
    assert 0 <= low <= 0.5 <= high <= 1
