"""Ids that the model's embedding has no row for."""

import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.data import DataStats, TokenizedRows
from phi3_jax.data.rows import Origins
from phi3_jax.data.vocabulary import check_ids, check_row_ids, unused_notice
from tests.helpers.checkpoints import OUTGROWN, OUTGROWN_ERROR
from tests.helpers.models import VOCAB
from tests.helpers.tokenizers import tiny_tokenizer


def refusal(ids, tokenizer=None, rows=VOCAB) -> str:
    with pytest.raises(InputError) as error:
        check_ids(ids, rows, "here", tokenizer)
    return str(error.value)


def test_every_row_of_the_table_may_be_asked_for():
    check_ids(np.arange(VOCAB), VOCAB, "here")
    check_ids(np.array([[0, VOCAB - 1]], np.uint16), VOCAB, "here")
    check_ids([], VOCAB, "here")


def test_the_token_the_table_and_the_spare_rows_are_named():
    assert refusal([3, 60, 70], tiny_tokenizer(OUTGROWN)) == f"here: {OUTGROWN_ERROR}"
    scattered = tiny_tokenizer({**OUTGROWN, "<a>": 45, "<b>": 47, "<c>": 49, "<d>": 51})
    assert "5 of them without a token: 44, 46, 48, …; give" in refusal([60], scattered)
    full = tiny_tokenizer({f"<{index}>": index for index in range(44, 61)})
    assert refusal([60], full) == (
        "here: token '<60>' has id 60, and the model's embedding has 53 rows (ids 0 to 52), none of them without a "
        "token; give a checkpoint whose embedding has been resized"
    )


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 53], "here: token id 53 has no row in the model's embedding, which has 53 (ids 0 to 52)"),
        ([[0, 1], [2, -3]], "here[1, 1]: token id -3 is negative; the model's embedding has 53 rows (ids 0 to 52)"),
        ([2**40], "here: token id 1099511627776 has no row"),
        ([2**70], "here: token ids are of type object, expected whole numbers below 53"),
        ([1.0], "here: token ids are of type float64"),
        (["1"], "here: token ids are of type <U1"),
    ],
)
def test_ids_that_no_token_has(ids, words):
    for tokenizer in (None, tiny_tokenizer()):
        assert refusal(ids, tokenizer).startswith(words)


def test_the_row_is_named():
    ids = np.array([1, 2, 3, 4, 60, 5], np.int32)
    origins = Origins(["a.jsonl", "b.jsonl"], np.array([0, 1, 1]), np.array([4, 0, 7]))
    ends = np.array([0, 2, 4, 6])
    rows = TokenizedRows(ids, np.ones(6, np.uint8), ends, np.zeros(3, np.int32), [""] * 3, DataStats(), origins)
    check_row_ids(rows, 61)
    with pytest.raises(InputError) as error:
        check_row_ids(rows, VOCAB, tiny_tokenizer(OUTGROWN), model="merged")
    assert str(error.value) == f"merged: b.jsonl, row 8: {OUTGROWN_ERROR}"


def test_tokens_beyond_the_table_that_nobody_uses_are_told():
    assert unused_notice(tiny_tokenizer(), VOCAB) is None
    assert unused_notice(tiny_tokenizer(OUTGROWN), 61) is None
    more = tiny_tokenizer({f"<{index}>": index for index in range(60, 65)})
    assert unused_notice(more, VOCAB) == (
        "the model's embedding has 53 rows, and none for 5 tokens of the tokenizer: '<60>' (60), '<61>' (61), "
        "'<62>' (62), …; rows and prompts with one are refused"
    )
