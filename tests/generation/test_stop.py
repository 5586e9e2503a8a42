"""Where answers come to contain a stop string, and what is left of them."""

from typing import Any

import numpy as np
import pytest

from phi3_jax.generation.stop import StopStrings
from tests.helpers.tokenizers import JULY, PHI_4, phi3_tokenizer, phi4_tokenizer

TOKENIZERS = {"sentencepiece": phi3_tokenizer(JULY), "byte-level": phi4_tokenizer(PHI_4)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop(tokenizer: Any, text: str, *strings: str, prompt: str = "") -> tuple[int, str]:
    """How many tokens of the answer are kept (-1: all), and its text."""
    stops = StopStrings(tokenizer, strings, [ids(tokenizer, prompt)])
    (kept,) = stops(np.array([ids(tokenizer, text)]))
    return int(kept), stops.text(0)


def test_the_token_that_completes_the_string_is_the_last_one(tokenizer: Any) -> None:
    kept, text = stop(tokenizer, "one two three two", "two")
    assert text == "one "
    assert tokenizer.decode(ids(tokenizer, "one two three two")[:kept]) == "one two"


def test_a_string_may_begin_and_end_inside_tokens(tokenizer: Any) -> None:
    """`the` is one token with the blank before it."""
    kept, text = stop(tokenizer, "x the y", "h")
    assert text == "x t"
    assert tokenizer.decode(ids(tokenizer, "x the y")[:kept]) == "x the"


def test_the_first_string_counts_and_of_two_at_one_token_the_earlier(tokenizer: Any) -> None:
    assert stop(tokenizer, "abcdef", "ef", "cd")[1] == "ab"
    assert stop(tokenizer, "abcdef", "cd", "bcd")[1] == "a"


def test_strings_of_characters_of_several_tokens(tokenizer: Any) -> None:
    kept, text = stop(tokenizer, "a😀b", "😀")
    assert (kept, text) == (len(ids(tokenizer, "a😀")), "a")


def test_no_string_no_end(tokenizer: Any) -> None:
    assert stop(tokenizer, "one two", "three") == (-1, "one two")
    assert stop(tokenizer, "one two") == (-1, "one two")


def test_a_string_may_begin_in_the_prompt_but_not_end_there(tokenizer: Any) -> None:
    whole = ids(tokenizer, "User: x")
    prompt = next(end for end in range(len(whole)) if tokenizer.decode(whole[:end]) == "Us")
    stops = StopStrings(tokenizer, ["User:"], [whole[:prompt]])
    assert stops(np.array([whole[prompt:]])).tolist() == [len("er:")]
    assert stops.text(0) == ""
    assert stop(tokenizer, "x", "User:", "a longer text", prompt="User:")[0] == -1


def test_special_tokens_are_no_text_but_can_stop(tokenizer: Any) -> None:
    special = "<|end|>" if tokenizer is TOKENIZERS["sentencepiece"] else "<|im_end|>"
    kept, text = stop(tokenizer, f"yes{special}no", special)
    assert (kept, text) == (len(ids(tokenizer, f"yes{special}")), "yes")
    assert stop(tokenizer, f"yes{special}no", "d|>") == (kept, "yes")


def test_rows_end_by_themselves_over_several_chunks(tokenizer: Any) -> None:
    answers = [ids(tokenizer, text) for text in ("x.yz..", "xyz.xy", "xyzxyz")]
    length = min(map(len, answers))
    rows = np.array([answer[:length] for answer in answers])
    stops = StopStrings(tokenizer, [".y", ".x"], [[], [], []])
    kept = [stops(rows[:, start : start + 2]).tolist() for start in range(0, length, 2)]
    ends = np.array([[2 * chunk + end if end >= 0 else -1 for end in ends] for chunk, ends in enumerate(kept)]).max(0)
    expected = [len(ids(tokenizer, "x.y")), len(ids(tokenizer, "xyz.x")), -1]
    assert ends.tolist() == expected
    assert [stops.has_ended(row) for row in range(3)] == [True, True, False]
    assert stops.text(0) == "x"
