"""Layers that carry their adapter."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.loralib import Linear
from phi3_jax.loralib.adapted import LoraParam, MergedWeight


def test_evaluation_merges_beside_the_base_and_training_drops_that_again():
    layer = Linear(4, 3, r=2, rngs=nnx.Rngs(0))
    for param in (layer.lora_A, layer.lora_B):
        assert isinstance(param, LoraParam)
        param.set_value(jnp.ones_like(param[...]))
    x, kernel = jnp.arange(4.0)[None], np.array(layer.kernel[...])
    apart = layer(x)
    layer.eval()
    assert layer.merged
    assert isinstance(layer.merged_weight, MergedWeight)
    np.testing.assert_allclose(layer(x), apart, rtol=1e-5)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    layer.train()
    assert not layer.merged
    assert not nnx.state(layer, MergedWeight)
