import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model.products import contract, precise_matmul, project, project_parts

# 1 + 257 · 2⁻⁸ · 2⁻⁸: the second term is lost where sums are in bfloat16.
HALVES = jnp.full((1, 258), 2.0**-8, jnp.bfloat16).at[0, 0].set(1)
SUM = 1 + 257 * 2.0**-16


def test_sums_of_16_bit_types_are_in_float32():
    total = contract(HALVES, HALVES, (1,), (1,))
    assert (total.dtype, float(total[0, 0])) == (jnp.float32, SUM)
    assert contract(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5)), (0, 1), (0, 1)).shape == (4, 5)


@pytest.mark.parametrize("dtype", [jnp.float32, None])
def test_a_projection_is_rounded_once(dtype):
    """1 + 257 · 2⁻¹⁶ is nearer to bfloat16's next number after 1 than to 1."""
    y = project(HALVES, HALVES, dtype)
    assert (y.dtype, float(y[0, 0])) == (dtype or jnp.bfloat16, float(jnp.asarray(SUM, y.dtype)))
    assert float(y[0, 0]) > 1


def test_gradients_of_a_projection_have_the_types_of_what_they_are_for():
    weight = jnp.ones((3, 258), jnp.bfloat16)
    dx, dw = jax.grad(lambda x, w: jnp.sum(project(x, w)), argnums=(0, 1))(HALVES, weight)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dx.astype(jnp.float32), 3)
    np.testing.assert_array_equal(dw, jnp.broadcast_to(HALVES, (3, 258)))


def test_a_precise_product_widens_first():
    product = precise_matmul(HALVES, HALVES.T)
    assert (product.dtype, float(product[0, 0])) == (jnp.float32, SUM)


def test_parts_are_products_with_rows_of_the_weight():
    keys = jax.random.split(jax.random.key(1), 5)
    x, weight = jax.random.normal(keys[0], (2, 3, 8)), jax.random.normal(keys[1], (7, 8))
    gs = tuple(jax.random.normal(key, (2, 3, n)) for key, n in zip(keys[2:], (4, 1, 2), strict=True))
    found, backward = jax.vjp(lambda x, weight: project_parts(x, weight, ((0, 4), (4, 5), (5, 7))), x, weight)
    whole, expected = jax.vjp(project, x, weight)
    np.testing.assert_allclose(jnp.concatenate(found, axis=-1), whole, rtol=0, atol=1e-5)
    for one, other in zip(expected(jnp.concatenate(gs, axis=-1)), backward(gs), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
