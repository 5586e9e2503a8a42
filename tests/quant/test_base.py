"""What the kinds of quantised weight share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.quant import is_quantized, make_quantizer


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_the_host_and_on_the_device_it_is_the_same_weight(kind):
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    host = make_quantizer(kind)("a", weight)
    assert is_quantized(host)
    assert not is_quantized(weight)
    assert host.shape == (4, 64)
    dense = host.dequantize(np.float32)
    assert 0 < np.abs(dense - weight).max() < 0.4
    device = jax.tree.map(jnp.asarray, host)
    np.testing.assert_allclose(device.dequantize(jnp.float32), dense, rtol=1e-6)
