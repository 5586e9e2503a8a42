"""Weights that are not finite: named while they are read."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from phi3_jax import InputError
from phi3_jax.hf.finite import is_finite, read_finite
from phi3_jax.hf.safetensors_io import read_header

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_to_numpys_isfinite(dtype):
    """For every 16-bit number, and the float32 of the same upper bits."""
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32) if dtype is np.float32 else bits.view(dtype)
    expected = np.isfinite(numbers.astype(np.float32))
    assert is_finite(numbers[expected])
    assert not any(is_finite(number[None]) for number in numbers[~expected])
    assert [is_finite(numbers[i : i + 1]) for i in range(0, 2**16, 7)] == expected[::7].tolist()
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(np.zeros(2**18, dtype), np.asarray(value, dtype)))


def test_whole_numbers_and_nothing_are_finite():
    assert is_finite(np.full(3, 255, np.uint8))
    assert is_finite(np.empty((0, 4), np.float32))
    assert is_finite(np.asarray(1, np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_tensor_and_the_place_are_named(dtype, tmp_path):
    values = np.ones((4, 5), np.float32)
    values[2, 3:] = np.nan
    save_file({"a.weight": values}, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["a.weight"]
    with pytest.raises(
        InputError, match=r"model\.safetensors: a\.weight holds 2 NaN or infinity \(the first at \[2, 3"
    ):
        read_finite(entry, np.empty((4, 5), dtype))
    with pytest.raises(InputError, match=r"holds 1 NaN or infinity \(the first at \[2, 4\]\)"):
        read_finite(entry, np.empty((2, 1), dtype), np.s_[1:3, 4:5])
    read_finite(entry, np.empty((2, 5), dtype), np.s_[:2, :])


@pytest.mark.filterwarnings("error")
def test_numbers_that_a_type_cannot_hold_are_not_blamed_on_the_file(tmp_path):
    save_file({"a.weight": np.asarray([1, -7e4], np.float32)}, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["a.weight"]
    read_finite(entry, np.empty(2, ml_dtypes.bfloat16))
    with pytest.raises(
        InputError, match=r"a\.weight has numbers up to 7e\+04, too great for float16 .* in bfloat16 or"
    ):
        read_finite(entry, np.empty(2, np.float16))
