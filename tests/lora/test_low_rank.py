"""The product that every plain adapter adds."""

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.lora import LoraLinear


def test_gradients_of_a_bfloat16_layers_adapter_are_summed_and_kept_in_float32():
    """1 + 257 · 2⁻⁸ · 2⁻⁸: the second term is lost where sums, or the result, are in bfloat16."""
    x = jnp.full((258, 1), 2.0**-8, jnp.bfloat16).at[0].set(1)
    cotangent = jnp.full((258, 1), 2.0**-8, jnp.bfloat16).at[0].set(1)
    adapter = LoraLinear(jnp.ones((1, 1)), jnp.ones((1, 1)), scaling=1.0)
    _, pull_back = jax.vjp(lambda adapter: adapter(jnp.zeros((258, 1), jnp.bfloat16), x, None), adapter)
    (grad,) = pull_back(cotangent)
    for value in (grad.lora_A, grad.lora_B):
        assert value.dtype == jnp.float32
        assert float(value[0, 0]) == 1 + 257 * 2.0**-16


def test_gradients_of_a_float32_layer_are_those_of_the_formula():
    keys = jax.random.split(jax.random.key(0), 5)
    x, y, g = jax.random.normal(keys[0], (2, 5, 7)), *jax.random.normal(keys[1], (2, 2, 5, 6))
    a, b = jax.random.normal(keys[2], (3, 7)), jax.random.normal(keys[3], (6, 3))

    def plain(y, x, a, b):
        return jnp.sum(g * (y + 1.5 * (x @ a.T) @ b.T))

    def ours(y, x, a, b):
        return jnp.sum(g * LoraLinear(a, b, scaling=1.5)(y, x, None))

    expected, found = (jax.grad(f, argnums=(0, 1, 2, 3))(y, x, a, b) for f in (plain, ours))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(one))))


def test_an_output_in_parts_is_that_of_the_whole():
    keys = jax.random.split(jax.random.key(0), 5)
    x, (y, g) = jax.random.normal(keys[0], (2, 5, 7)), jax.random.normal(keys[1], (2, 2, 5, 6))
    adapter = LoraLinear(
        jax.random.normal(keys[2], (3, 7)),
        jax.random.normal(keys[3], (6, 3)),
        1.5,
        dropout=0.5,
        lora_bias=jnp.arange(6.0),
    )
    rows = [slice(0, 4), slice(4, 6)]

    def whole(y, x, adapter):
        return adapter(y, x, None, keys[4])

    def in_parts(y, x, adapter):
        return jnp.concatenate(adapter.on_parts([y[..., part] for part in rows], x, rows, keys[4]), axis=-1)

    expected, found = (jax.vjp(f, y, x, adapter) for f in (whole, in_parts))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(*(jax.tree.leaves(backward(g)) for _, backward in (expected, found)), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * float(jnp.abs(one).max()))
