"""Principal components of rows that come in batches."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.lora.pca import IncrementalPCA

KEY = jax.random.key(0)


def test_incremental_components_are_those_of_all_rows_at_once():
    """With as many components as columns nothing is thrown away in between."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)) * np.array([5, 4, 3, 2, 1, 0.5]) + 10 + np.arange(60)[:, None] / 20
    counted = rng.random(60) < 0.7
    pca = IncrementalPCA.empty(6, 6)
    for part in np.split(np.arange(60), 4):
        pca = pca.updated(jnp.asarray(x[part]), jnp.asarray(counted[part]), 0.99, KEY)
    seen = x[counted]
    _, s, v = np.linalg.svd(seen - seen.mean(axis=0))
    np.testing.assert_allclose(pca.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(pca.singular_values, s, rtol=1e-5)
    np.testing.assert_allclose(pca.explained, s**2 / np.sum(s**2), rtol=1e-5)
    np.testing.assert_allclose(np.abs(pca.components @ v.T), np.eye(6), atol=1e-4)
    assert pca.count == counted.sum()
