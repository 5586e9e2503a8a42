"""Layers whose keys and values a cache keeps compute what they compute without."""

import jax.numpy as jnp
import numpy as np

from phi3_jax.model.cache import empty_cache
from tests.helpers.models import smallest_model


def test_token_by_token_is_all_at_once():
    model = smallest_model()
    ids = jnp.array([[3, 4, 5, 6]])
    cache = empty_cache(model.config, 1, 4, model.dtype)
    first, cache = model(ids[:, :2], cache=cache)
    second, cache = model(ids[:, 2:], cache=cache)
    assert int(cache.length) == 4
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), model(ids), rtol=1e-5, atol=1e-6)
