"""The largest singular values, exact and randomised."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.lora.pca import IncrementalPCA

KEY = jax.random.key(0)


def test_the_randomised_components_are_near_the_exact_ones():
    """k = 3 of 200 columns, in noise: six random columns, four power iterations."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) @ np.diag([9, 6, 4]) @ rng.normal(size=(3, 200)) + rng.normal(size=(300, 200))
    pca = IncrementalPCA.empty(3, 200).updated(jnp.asarray(x), jnp.ones(300, bool), 0.99, KEY)
    _, s, v = np.linalg.svd(x - x.mean(axis=0))
    np.testing.assert_allclose(pca.singular_values, s[:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(pca.components * v[:3], axis=1)), 1, atol=1e-5)
