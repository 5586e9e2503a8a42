"""NF4 and int8 by their definitions, worked by hand. (Against bitsandbytes: tests/parity/test_quant_parity.py)"""

from dataclasses import fields

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.quant import FP4Weight, NF4Weight, quantize_int8, quantize_nf4
from phi3_jax.quant.blocks import NF4_LEVELS
from phi3_jax.quant.dynamic import dynamic_map


def random_weight(shape=(16, 128), dtype=np.float32) -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def on_device(quantized):
    return jax.tree.map(jnp.asarray, quantized)


class TestNF4:
    def test_by_hand(self):
        """The sixteen levels four times over, times 3: codes 0 to 15, two a byte, the first in the high bits."""
        weight = np.tile(np.float32(3) * NF4_LEVELS, 4)[None]
        quantized = quantize_nf4(weight, double_quant=False)
        assert quantized.codes.tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4]
        assert quantized.absmax.tolist() == [[3.0]]
        assert quantized.nested_absmax is quantized.offset is None
        assert np.array_equal(quantized.dequantize(np.float32), weight)

    def test_double_quantisation_by_hand(self):
        """Absmax 1, 2 and 6: mean 3, so -2, -1 and 3 are kept as the levels nearest to -2/3, -1/3 and 1."""
        weight = np.repeat(np.asarray([1, -2, 6], np.float32), 64)[None]
        quantized = quantize_nf4(weight)
        assert (quantized.offset, quantized.nested_absmax.tolist()) == (3.0, [3.0])
        assert quantized.absmax.dtype == np.uint8
        levels = dynamic_map(signed=True)
        nearest = [int(np.abs(levels - np.float32(x)).argmin()) for x in (-2 / 3, -1 / 3, 1)]
        assert quantized.absmax.tolist() == [nearest]
        assert np.array_equal(quantized.absmax_values(np)[0], 3 * levels[nearest] + 3)

    @pytest.mark.parametrize(
        ("shape", "codes", "absmax"), [((16, 128), (16, 64), (16, 2)), ((16, 96), (768,), (24,)), ((5, 7), (18,), (1,))]
    )
    def test_rows_are_an_axis_where_blocks_end_with_them(self, shape, codes, absmax):
        quantized = quantize_nf4(random_weight(shape))
        assert quantized.shape == shape
        assert (quantized.codes.shape, quantized.absmax.shape) == (codes, absmax)
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), on_device(quantized))
        assert stack.shape == (2, *shape)

    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("shape", [(16, 128), (7, 100)])
    def test_the_error_is_at_most_half_a_gap(self, shape, double_quant):
        weight = random_weight(shape)
        quantized = quantize_nf4(weight, double_quant=double_quant)
        error = np.abs(quantized.dequantize(np.float32) - weight).max()
        # The widest gap between levels, 0.304, halved, times the largest weight; 2% for nested statistics.
        assert error <= 0.152 * np.abs(weight).max() * (1.02 if double_quant else 1.0001)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("shape", [(16, 128), (7, 100)])
    def test_the_device_computes_what_numpy_does(self, shape, dtype):
        quantized = quantize_nf4(random_weight(shape))
        device = jax.jit(lambda weight: weight.dequantize(dtype))(on_device(quantized))
        assert device.dtype == dtype
        assert np.array_equal(np.asarray(device), quantized.dequantize(dtype))

    def test_subnormal_numbers_are_kept_on_the_host(self):
        weight = random_weight()
        weight *= np.float32(1.1e-38) / np.abs(weight).max(axis=1, keepdims=True)  # the largest is subnormal
        values = quantize_nf4(weight, double_quant=False).dequantize(np.float32)
        assert np.array_equal(np.abs(values).max(axis=1), np.abs(weight).max(axis=1))
        assert 0 < np.abs(values).max() < np.finfo(np.float32).smallest_normal

    def test_remembers_the_type_and_gives_arrays_of_the_kind_it_was_given(self):
        quantized = quantize_nf4(random_weight(dtype=ml_dtypes.bfloat16))
        assert quantized.dtype == jnp.bfloat16
        assert isinstance(quantized.codes, np.ndarray)
        device = quantize_nf4(jnp.asarray(random_weight(dtype=ml_dtypes.bfloat16)))
        assert isinstance(device.codes, jax.Array)
        assert all(map(np.array_equal, jax.tree.leaves(quantized), jax.tree.leaves(device)))

    @pytest.mark.parametrize("shape", [(2, 64), (1, 10)])
    @pytest.mark.parametrize("value", [np.inf, np.nan])
    def test_what_is_not_finite_is_refused(self, shape, value):
        weight = random_weight(shape)
        weight[-1, -1] = value
        with pytest.raises(InputError, match="infinity or NaN"):
            quantize_nf4(weight)


class TestByHalves:
    """How codes lie in a TPU's memory: byte i of a row has its numbers i and, in the low bits, half a row further."""

    def test_by_hand(self):
        weight = np.concatenate([np.tile(np.float32(3) * NF4_LEVELS, 4), np.full(64, 2, np.float32)])[None]
        laid_out = quantize_nf4(weight, double_quant=False).laid_out("tpu")
        assert laid_out.codes.tolist() == [[code << 4 | 15 for code in range(16)] * 4]
        assert laid_out.by_halves
        assert laid_out.absmax.tolist() == [[3.0, 2.0]]

    @pytest.mark.parametrize("kind", [NF4Weight, FP4Weight])
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
    def test_numbers_are_the_same_to_the_bit(self, kind, double_quant, dtype):
        layers = []
        for columns in np.random.default_rng(1).standard_normal((3, 6, 384)).astype(np.float32):
            nf4 = quantize_nf4(columns, double_quant=double_quant)
            layers.append(kind(**{field.name: getattr(nf4, field.name) for field in fields(nf4)}))
        both = [jax.tree.map(lambda *x: jnp.stack(x), *(w.laid_out(p) for w in layers)) for p in ("cpu", "tpu")]
        assert [stack.by_halves for stack in both] == [False, True]
        assert both[0].shape == both[1].shape == (3, 6, 384)

        @jax.jit
        def of_all(stack):
            return jax.lax.scan(lambda _, weight: (None, weight.dequantize(dtype)), None, stack)[1]

        expected, found = (np.asarray(of_all(stack)) for stack in both)
        assert expected.tobytes() == found.tobytes()
        for weight, on_tpu in zip(layers, expected, strict=True):
            assert weight.laid_out("tpu").dequantize(dtype).tobytes() == on_tpu.tobytes()  # by numpy

    def test_there_and_back(self):
        before = quantize_nf4(random_weight((4, 256)))
        back = before.laid_out("tpu").laid_out("tpu").laid_out("gpu")
        assert jax.tree.structure(back) == jax.tree.structure(before)
        assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(before)))

    @pytest.mark.parametrize(
        ("width", "platform"), [(64, "tpu"), (192, "tpu"), (100, "tpu"), (256, "cpu"), (256, "gpu")]
    )
    def test_where_it_is_left_as_in_the_file(self, width, platform):
        weight = quantize_nf4(random_weight((4, width)))
        assert weight.laid_out(platform) is weight

    def test_int8_has_one_layout(self):
        weight = quantize_int8(random_weight())
        assert weight.laid_out("tpu") is weight


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_gradient_flows_to_the_base(quantize, platform):
    weight = on_device(quantize(random_weight()).laid_out(platform))
    x = jnp.asarray(random_weight((3, 128)))

    def output(x, scale):
        # Were dequantisation differentiable, this scale of the statistics would have a gradient.
        own = jax.tree.map(lambda leaf: leaf * scale if leaf.dtype == jnp.float32 else leaf, weight)
        return jnp.sum(x @ own.dequantize(jnp.float32).T)

    by_x, by_scale = jax.grad(output, argnums=(0, 1))(x, jnp.float32(1))
    assert by_scale == 0
    assert np.allclose(by_x, jnp.sum(weight.dequantize(jnp.float32), axis=0), rtol=1e-5, atol=1e-6)
