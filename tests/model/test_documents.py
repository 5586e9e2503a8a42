"""Documents of packed rows, and of rows that nobody packed."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model.documents import documents, token_counts
from phi3_jax.system.errors import InputError

ROWS = {
    "packed": [1, 1, 1, 2, 2, 3, 0, 0],
    "left-padded": [0, 0, 1, 1, 1, 1, 1, 1],
    "out of order, and larger than the row is long": [900, 3, 900, -2, 3, 900, 7, 7],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_token_counts_those_with_its_id(row):
    segments = np.array([row, row[::-1]])
    expected = (segments[:, :, None] == segments[:, None, :]).sum(-1)
    np.testing.assert_array_equal(token_counts(jnp.asarray(segments)), expected)


def test_segment_ids_count_more_than_a_mask():
    ids, mask, segments = np.full((1, 3), 7), np.array([[1, 1, 0]]), np.array([[1, 2, 0]])
    assert documents({"input_ids": ids}).tolist() == [[1, 1, 1]]
    assert documents({"input_ids": ids, "attention_mask": mask}).tolist() == mask.tolist()
    both = {"input_ids": ids, "attention_mask": mask, "segment_ids": segments}
    assert documents(both).tolist() == segments.tolist()
    with pytest.raises(InputError, match="a batch has labels, expected at least input_ids"):
        documents({"labels": ids})
