"""Rotary positions."""

import jax.numpy as jnp

from phi3_jax.model.rope import length_in_use


def test_length_in_use_is_each_documents_own() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 9]])
    assert length_in_use(positions, segments)[0, :5].tolist() == [3, 3, 3, 2, 2]
