"""Which values are numbers."""

import math

import numpy as np
import pytest

from phi3_jax.system.numbers import is_number, is_whole


@pytest.mark.parametrize("value", [0, -3, 2**70])
def test_a_whole_number_is_both(value):
    assert is_whole(value)
    assert is_number(value)


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_a_float_is_no_whole_number(value):
    assert is_number(value)
    assert not is_whole(value)


@pytest.mark.parametrize("value", [True, False, None, "1", [1], np.int32(1)])
def test_neither(value):
    assert not is_whole(value)
    assert not is_number(value)
