"""Initialisers that take A and B from a weight."""

import jax
import numpy as np

from phi3_jax.lora.initialisers import olora, pissa

WEIGHT = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)


def test_pissa_is_the_part_of_the_largest_singular_values():
    a, b = pissa("pissa", jax.random.key(0))(WEIGHT, 2, 0.5)
    u, s, vh = np.linalg.svd(WEIGHT)
    np.testing.assert_allclose(0.5 * (b @ a), u[:, :2] * s[:2] @ vh[:2], atol=1e-5)


def test_olora_has_orthonormal_columns():
    a, b = olora(WEIGHT, 3, 2.0)
    assert (a.shape, b.shape) == ((3, 8), (6, 3))
    gram = np.asarray(b.T @ b)
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(3), atol=1e-5)
