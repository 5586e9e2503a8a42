"""4-bit codes in blocks."""

import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.quant.blocks import BLOCK_SIZE, NF4_LEVELS, quantize_blocks


def test_the_nearest_level_of_the_blocks_largest():
    weight = np.concatenate([3 * NF4_LEVELS, np.zeros(BLOCK_SIZE - 16), [-2.0, 1.0]]).astype(np.float32)
    codes, absmax = quantize_blocks(weight)
    assert absmax.tolist() == [3, 2]
    assert codes[:8].tolist() == [16 * i + i + 1 for i in range(0, 16, 2)]  # two a byte, the first in the high bits


def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError):
        quantize_blocks(np.array([1.0, np.nan], np.float32))
