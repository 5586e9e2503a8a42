"""What a run starts from."""

import jax
import numpy as np

from phi3_jax import LoraConfig, init_lora
from phi3_jax.parallel.mesh import make_mesh
from phi3_jax.training.start import fresh_lora
from tests.helpers.models import smallest_model


def test_a_fresh_adapter_is_init_loras_with_the_same_key():
    model, config, key = smallest_model(), LoraConfig(r=2), jax.random.key(3)
    fresh = fresh_lora(model, config, key, make_mesh({}, jax.devices()[:1]))
    for one, other in zip(*map(jax.tree.leaves, (fresh, init_lora(model, config, key))), strict=True):
        np.testing.assert_array_equal(one, other)
