"""The layers that Phi-3 is built of."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.model.layers import ACTIVATIONS, SplitWeight, look_up


def test_the_padding_tokens_row_has_no_gradient():
    table, ids = jnp.ones((4, 2)), jnp.array([[1, 0, 3]])
    grads = jax.grad(lambda table: look_up(table, ids, 0).sum())(table)
    assert grads[:, 0].tolist() == [0, 1, 0, 1]
    assert jax.grad(lambda table: look_up(table, ids, None).sum())(table)[0, 0] == 1


def test_gelu_is_exact_and_its_new_form_is_not():
    x = jnp.linspace(-3, 3, 50)
    exact = x * jax.scipy.stats.norm.cdf(x)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, atol=1e-6)
    assert np.abs(ACTIVATIONS["gelu_new"](x) - exact).max() > 1e-5


def test_a_split_weight_has_the_shape_of_the_whole():
    assert SplitWeight((jnp.zeros((3, 4, 8)), jnp.zeros((3, 2, 8)))).shape == (3, 6, 8)
