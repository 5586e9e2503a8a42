"""What a model makes of the evaluation set."""

import pytest

from phi3_jax.system.errors import InputError
from phi3_jax.training.evaluation import choose_prompts, evaluate_rows, exact_match


def test_prompts_that_are_too_long_or_empty_are_left_out():
    prompts = [([1] * length, str(length)) for length in (0, 5, 2, 9, 3)]
    assert [reference for _, reference in choose_prompts([prompts], 2, 5)] == ["5", "2"]


def test_figures_of_each_set_and_of_all_rows_together():
    def step(_, __, batch):
        return batch

    sets = {
        "eval_chats": [([2.0, 4.0], [2, 0], [1, 0]), ([6.0, 0.0], [2, 0], [2, 0])],
        "eval_code": [([1.0], [4], [4])],
    }
    found = evaluate_rows(step, None, None, sets)
    assert [found[f"eval{name}_loss"] for name in ("", "_chats", "_code")] == [9 / 8, 2.0, 0.25]
    assert found["eval_chats_token_accuracy"] == 0.75
    assert found["eval_code_loss_interval"] == [0.25, 0.25]
    assert evaluate_rows(step, None, None, {"eval": [*sets["eval_chats"], *sets["eval_code"]]})["eval_loss"] == 9 / 8
    with pytest.raises(InputError, match="the evaluation set code has no target tokens"):
        evaluate_rows(step, None, None, {"eval_code": [([0.0], [0], [0])]})


def test_space_around_an_answer_is_no_difference():
    prompts = [([1], " yes "), ([1], "no"), ([1], "maybe"), ([1], "so")]
    figures = exact_match(["yes", "nope", "maybe", "So"], prompts)
    assert figures["exact_match"] == pytest.approx(0.5)
    low, high = figures["exact_match_interval"]
    assert 0 <= low <= 0.5 <= high <= 1
