"""Rows as plain arrays, which may have been written by anybody."""

import numpy as np
import pytest

from phi3_jax.data.row_arrays import from_arrays, to_arrays
from phi3_jax.data.rows import DataStats, Origins, TokenizedRows

NAMES = ["a.jsonl", "b.jsonl"]


@pytest.fixture
def arrays():
    ids, mask = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 1, 0, 0, 1], np.uint8)
    origins = Origins(NAMES, np.array([0, 1], np.int32), np.array([3, 0], np.int32))
    rows = TokenizedRows(ids, mask, np.array([0, 2, 5]), np.array([1, 2]), ["six", "ä"], DataStats(NAMES), origins)
    return to_arrays(rows)


def test_rows_come_back(arrays):
    rows = from_arrays(arrays, DataStats(), NAMES)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in rows] == [([5, 6], [0, 1]), ([7, 8, 9], [0, 0, 1])]
    assert (list(rows.references), rows.prompt_lengths.tolist()) == (["six", "ä"], [1, 2])
    assert [rows.where(index) for index in range(2)] == ["a.jsonl, row 4", "b.jsonl, row 1"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", np.arange(5), "input_ids is int64"),
        ("input_ids", np.zeros((5, 1), np.int32), r"input_ids is int32 \(5, 1\)"),
        ("input_ids", np.arange(4, dtype=np.int32), "4 ids, and 5 marks"),
        ("input_ids", np.array([5, 6, 7, 8, -1], np.int32), "ids that the tokenizer does not have"),
        ("input_ids", np.array([5, 6, 7, 8, 10], np.int32), "ids that the tokenizer does not have"),
        ("loss_mask", np.array([0, 2, 0, 0, 1], np.uint8), "other than 0 and 1"),
        ("offsets", np.array([0, 2, 6]), "do not follow one another"),
        ("offsets", np.array([0, 0, 5]), "do not follow one another"),
        ("offsets", np.array([1, 2, 5]), "do not follow one another"),
        ("offsets", np.array([0]), "there is no row"),
        ("prompt_lengths", np.array([1, 4], np.int32), "prompts longer than their rows"),
        ("prompt_lengths", np.array([-1, 2], np.int32), "prompts longer than their rows"),
        ("reference_offsets", np.array([0, 9, 5]), "do not follow one another"),
        ("reference_offsets", np.array([0, 5]), "not as many of each as rows"),
        ("source_numbers", np.array([0, 2], np.int32), "sources that are not there"),
        ("row_numbers", np.array([0, -2]), "rows before the first"),
        ("other", np.zeros(1), "the arrays"),
    ],
)
def test_what_does_not_fit_together_is_refused(arrays, name, value, message):
    with pytest.raises(ValueError, match=message):
        from_arrays({**arrays, name: value}, DataStats(), NAMES, vocabulary=10)
