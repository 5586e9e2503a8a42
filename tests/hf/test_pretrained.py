"""`from_pretrained` and `save_pretrained`: to files and back."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import Phi3ForCausalLM
from tests.helpers.models import smallest_model


def test_there_and_back(tmp_path):
    model = smallest_model()
    model.save_pretrained(str(tmp_path))
    loaded = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    ids = jnp.array([[3, 4, 5]])
    np.testing.assert_array_equal(jax.jit(loaded)(ids), jax.jit(model)(ids))
    assert Phi3ForCausalLM.from_pretrained(str(tmp_path)).dtype == jnp.bfloat16
