"""Random weights in place of a checkpoint."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax.performance.weights import random_model
from phi3_jax.quant import quantize_model
from tests.helpers.benchmarks import CONFIG


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_random_weights_are_drawn_as_the_model_draws_them(quantization):
    model = random_model(CONFIG, dtype=jnp.bfloat16, quantization=quantization)
    plain = random_model(CONFIG, dtype=jnp.bfloat16)
    wanted = plain if quantization is None else quantize_model(plain, quantization)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(model)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.state(wanted)
    )
    gate = plain.model.layers.mlp.gate_up_proj.weight[...]
    assert float(jnp.std(gate.astype(jnp.float32))) == pytest.approx(CONFIG.initializer_range, rel=0.02)
    assert not jnp.array_equal(gate[0], gate[1])
    assert (plain.model.norm.weight[...] == 1).all()
