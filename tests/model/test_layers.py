"""The layers that Phi-3 is built of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.lora.adapters import DoraLinear, LoraLinear
from phi3_jax.model import layers, products
from phi3_jax.model.layers import ACTIVATIONS, FusedLinear, SplitWeight, look_up


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


@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_a_fused_layer_in_products_of_its_own_is_the_same(kind, monkeypatch):
    """As on TPUs, of enough rows: outputs, and gradients of the input, the weight and the adapter."""
    rng = np.random.default_rng(0)
    rows, inputs, sizes = 128, 24, {"q": 16, "k": 8, "v": 8}
    layer = FusedLinear(inputs, sizes, 0.1, jnp.bfloat16, nnx.Rngs(0), ())
    graph, state = nnx.split(layer)
    x, *gs = (jnp.asarray(rng.normal(size=(2, rows // 2, n)), jnp.bfloat16) for n in (inputs, *sizes.values()))
    a, b = jnp.asarray(rng.normal(size=(4, inputs))), jnp.asarray(rng.normal(size=(32, 4)))
    bias, magnitude = jnp.asarray(rng.normal(size=32)), jnp.asarray(rng.uniform(1, 2, size=32))
    adapter = {
        "none": None,
        "lora": LoraLinear(a, b, 0.5, dropout=0.3, lora_bias=bias),
        "dora": DoraLinear(a, b, magnitude, 0.5, dropout=0.3),
    }[kind]

    def run(x):
        def outputs(x, state, adapter):
            return nnx.merge(graph, state).split(x, adapter, {}, jax.random.key(1))

        # Not traced again for another device otherwise.
        out, backward = jax.vjp(jax.jit(lambda *args: outputs(*args)), x, state, adapter)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, backward([g[:, : x.shape[1]] for g in gs])))

    calls = []
    monkeypatch.setattr(layers, "project_parts", lambda *args: calls.append(args) or products.project_parts(*args))
    expected = run(x)
    assert not calls
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    monkeypatch.setattr(layers, "_FEW_ROWS", 128)
    for found, wanted in zip(jax.tree.leaves(run(x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())
    assert len(calls) == 1
    run(x[:, :3])  # six rows: the weight is read, whatever the number of products
    assert len(calls) == 1
