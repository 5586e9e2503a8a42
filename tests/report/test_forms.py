"""How values are written for people."""

import pytest

from phi3_jax.report.forms import (
    bytes_text,
    figure_words,
    form_of,
    last_name,
    number,
    p_value_text,
    seconds_text,
    value_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (999.96, "1000"), (1000.4, "1,000"), (-102821.08, "-102,821"), (2e9, "2e+09"), (0.0, "0")],
)
def test_four_digits_count_and_thousands_are_written_out(value, text):
    assert number(value) == text


def test_a_figure_is_written_in_one_way():
    assert form_of("eval_loss").write(0.00976) == "0.0098"
    assert form_of("perplexity").write(1.00981) == "1.0098"
    assert form_of("bleu").write(5.1234) == "5.12"
    assert form_of("some_check").heading == "some check"
    assert form_of("loss").less_is_better
    assert form_of("eval_my_code_token_accuracy").write(0.5) == "50.0%"
    assert figure_words("eval_my_code_token_accuracy") == "token accuracy of my_code"
    assert form_of("train_loss").heading == "train loss"
    assert not form_of("accuracy").less_is_better


def test_differences_have_signs():
    form = form_of("exact_match")
    assert [form.signed(x) for x in (0.25, -0.25, 0.0, float("nan"))] == ["+25.0%", "-25.0%", "+0.0%", "nan%"]


def test_sizes_times_names_and_chances():
    assert [seconds_text(x) for x in (5.04, 245.2, 11220, float("inf"))] == ["5.0 s", "4 min 05 s", "3 h 07 min", "inf"]
    assert [bytes_text(x) for x in (3 * 2**20, 3 * 2**30)] == ["3 MiB", "3.00 GiB"]
    assert [last_name(x) for x in ("a/b", "a\\b\\", "/")] == ["b", "b", "/"]
    assert [p_value_text(x) for x in (0.0004, 0.001, 1.0)] == ["<0.001", "0.001", "1.000"]
    assert value_text([1, 2.5, True, None, "x"]) == "1, 2.5, true, null, x"
