"""Tokenised rows."""

from itertools import pairwise

import pytest

from phi3_jax.data.rows import length_figures, length_histogram


@pytest.mark.parametrize("longest", [7, 35, 36, 2000])
def test_lengths_are_counted_in_bins_of_equal_width(longest):
    lengths = [5, 5, longest - 1, longest, longest + 1, 10**6]
    found = length_histogram(lengths, longest)
    edges, counts = found["edges"], found["counts"]
    assert len(counts) == len(edges) - 1 <= 31
    assert len({b - a for a, b in pairwise(edges)}) == 1
    assert sum(counts) == 4
    assert counts[0] == 2
    assert edges[0] == 5
    assert edges[-2] <= longest < edges[-1]
    assert length_histogram([3], 2) == {"edges": [], "counts": []}


def test_figures_of_lengths_are_lengths_of_rows():
    lengths = list(range(1, 101))
    assert length_figures(lengths[::-1]) == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert length_figures([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
