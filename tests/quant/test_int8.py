"""Int8 as LLM.int8() stores it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.quant import quantize_int8


def on_device(quantized):
    return jax.tree.map(jnp.asarray, quantized)


class TestInt8:
    def test_by_hand(self):
        weight = np.asarray([[0.5, -1, 0.25, 0], [0, 0, 0, 0], [2, 1, -2, 1e-9]], np.float32)
        quantized = quantize_int8(weight)
        assert quantized.codes.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0], [127, 64, -127, 0]]
        assert quantized.absmax.tolist() == [1, 0, 2]
        assert quantized.shape == weight.shape
        expected = quantized.codes * quantized.absmax[:, None] * np.float32(1 / 127)
        assert np.array_equal(quantized.dequantize(np.float32), expected)
        assert np.array_equal(on_device(quantized).dequantize(jnp.bfloat16), expected.astype(ml_dtypes.bfloat16))

    @pytest.mark.parametrize("value", [np.inf, np.nan, 7e4])
    def test_what_is_not_finite_in_float16_is_refused(self, value):
        with pytest.raises(InputError, match="not finite in float16"):
            quantize_int8(np.asarray([[1, value]], np.float32))
