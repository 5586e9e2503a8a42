"""Adafactor's state; its steps are held against transformers' in tests/parity/test_optimizer_parity.py."""

import jax.numpy as jnp
import numpy as np

from phi3_jax.optim.adafactor import Factors, scale_by_adafactor


def test_matrices_are_factored_layer_by_layer_and_vectors_are_not():
    params = {"layers": {"lora_A": jnp.ones((3, 2, 5)), "bias": jnp.ones((3, 4))}, "lora_B": jnp.ones((6, 2))}
    nu = scale_by_adafactor().init(params).nu
    assert [x.shape for x in nu["layers"]["lora_A"]] == [(3, 2), (3, 5)]
    assert nu["layers"]["bias"].shape == (3, 4)
    assert isinstance(nu["lora_B"], Factors)


def test_a_layer_is_clipped_by_its_own_size():
    """Through the second moment of the first step, a large second gradient gives a direction above 1."""
    tx = scale_by_adafactor()
    small = {"layers": {"lora_A": jnp.ones((2, 2, 3))}}
    _, state = tx.update(small, tx.init(small))
    grads = {"layers": {"lora_A": jnp.stack([jnp.ones((2, 3)), jnp.full((2, 3), 1e3)])}}
    direction, _ = tx.update(grads, state)
    np.testing.assert_allclose(direction["layers"]["lora_A"], np.ones((2, 2, 3)), rtol=1e-6)
