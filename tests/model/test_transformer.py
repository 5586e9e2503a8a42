"""The model without its head."""

import jax.numpy as jnp
import numpy as np

from tests.helpers.models import smallest_model


def test_it_gives_every_layers_input_and_a_normed_output():
    body = smallest_model(initializer_range=0.3).model
    ids = jnp.array([[3, 4, 5]])
    rows = body.embed_tokens.weight[ids]
    x, inputs = body(rows, jnp.arange(3)[None], jnp.ones((1, 3), int), {}, None, "xla", False, True)
    assert inputs.shape == (3, 1, 3, 16)
    np.testing.assert_array_equal(inputs[0], rows)
    np.testing.assert_allclose(np.mean(np.square(x), axis=-1), 1, rtol=1e-3)  # of norms that are all ones
