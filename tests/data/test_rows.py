"""Tokenised rows."""

from itertools import pairwise

import pytest

from phi3_jax.data import prepare_data, preview
from phi3_jax.data.rows import length_histogram
from tests.helpers.tokenizers import JULY, phi3_tokenizer


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


def test_a_preview_is_one_short_line_that_cannot_steer_a_terminal(chats):
    data = chats({"prompt": "a\x1b[2J\nb", "completion": "c " * 40}, max_length=256)
    tokenizer = phi3_tokenizer(JULY)
    rows = prepare_data(data, tokenizer, seed=0).train
    whole = preview(rows, tokenizer, tokens=1000)
    assert whole.isprintable()
    assert "⏎" in whole
    assert preview(rows, tokenizer, tokens=12).endswith(" …")
    assert whole.startswith(preview(rows, tokenizer, tokens=5).removesuffix(" …")[:5])
