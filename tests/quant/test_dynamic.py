"""The 8-bit dynamic data type."""

import numpy as np
import pytest

from phi3_jax.quant.dynamic import dynamic_map


@pytest.mark.parametrize("signed", [True, False])
def test_its_numbers_are_256_ascend_and_end_at_one(signed):
    numbers = dynamic_map(signed=signed)
    assert numbers.shape == (256,)
    assert (np.diff(numbers) > 0).all()
    assert numbers[-1] == 1
    assert 0 in numbers
    # Of seven decades, the negative ones mirrored but for the 1.
    assert np.isin(-numbers[numbers < 0], numbers).all()
    assert (numbers < 0).sum() == (127 if signed else 0)
