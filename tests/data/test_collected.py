"""Rows that are collected in arrays."""

import numpy as np

from phi3_jax.data.collected import Collected
from phi3_jax.data.row_arrays import TYPES, from_arrays
from phi3_jax.data.row_tokenizer import Row, TokenizedRow
from phi3_jax.data.rows import DataStats
from phi3_jax.data.sources import Source


def test_rows_come_out_as_they_went_in():
    sources = [Source("a", [{}] * 9), Source("b", [{}] * 9)]
    found = Collected(["a", "b"])
    for number in range(1, 300):
        ids, mask = np.full(number, number, np.int32), np.arange(number) % 2
        row = Row(sources[number % 2], number % 9)
        found.add(TokenizedRow(row, ids, mask.astype(np.uint8), number + 1, number // 2, f"ä{number}"))
    arrays = found.arrays()
    assert arrays.pop("lengths").tolist() == list(range(2, 301))
    assert {name: array.dtype.type for name, array in arrays.items()} == TYPES
    rows = from_arrays(arrays, DataStats(), ["a", "b"])
    for number, (ids, mask) in enumerate(rows, 1):
        assert (ids == number).all()
        assert mask.tolist() == (np.arange(number) % 2).tolist()
        assert rows.references[number - 1] == f"ä{number}"
        assert rows.where(number - 1) == f"{'ab'[number % 2]}, row {number % 9 + 1}"
    assert rows.prompt_lengths.tolist() == [number // 2 for number in range(1, 300)]
