"""Layers that carry their adapter: modes, merging, what a filter finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import phi3_jax.loralib as lora
from tests.helpers.models import filled

MAKERS = {
    "Linear": lambda rngs: lora.Linear(6, 8, 2, 3, rngs=rngs),
    "transposed": lambda rngs: lora.Linear(6, 8, 2, 3, fan_in_fan_out=False, rngs=rngs),
    "MergedLinear": lambda rngs: lora.MergedLinear(6, 8, 2, 3, enable_lora=[False, True], rngs=rngs),
    "Conv1d": lambda rngs: lora.Conv1d(6, 8, 3, 2, 3, rngs=rngs),
    "Embedding": lambda rngs: lora.Embedding(7, 6, 2, 3, rngs=rngs),
}


def make(kind, seed=0):
    """(layer with nothing zero, an input)."""
    layer = filled(lambda: MAKERS[kind](nnx.Rngs(0)), seed)
    if kind == "Embedding":
        return layer, jnp.arange(6).reshape(2, 3)
    return layer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MAKERS)
def test_merging_any_number_of_times_changes_nothing(kind):
    layer, x = make(kind)
    before, y = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer))), layer(x)
    for _ in range(2):
        layer.eval()
    assert layer.merged
    merged = layer(x)
    assert_close(merged, y)

    # Saved in evaluation mode, whole or without the merged weight, loaded elsewhere and merged there.
    for saved in (nnx.state(layer), nnx.state(layer, (nnx.Param, lora.LoraParam))):
        other, _ = make(kind, seed=1)
        nnx.update(other, saved)
        assert_close(other(x), y)
        assert not other.merged  # it trains still
        other.eval()
        np.testing.assert_array_equal(other(x), merged)
        other.train()
        np.testing.assert_array_equal(other(x), y)

    layer.train()
    assert not layer.merged
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer)), before)  # to the bit


@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
def test_evaluation_computes_with_one_weight(kind):
    """After merging, the adapter's arrays are not looked at; merging anew takes them in."""
    layer, x = make(kind)
    layer.eval()
    y = layer(x)
    layer.lora_B[...] = layer.lora_B[...] * 2
    np.testing.assert_array_equal(layer(x), y)
    layer.eval()
    assert np.abs(layer(x) - y).max() > 0.1
    y = layer(x)
    layer.train()
    assert_close(layer(x), y)


def test_without_merge_weights_evaluation_stays_unmerged_and_drops_nothing():
    layer = filled(lambda: lora.Linear(6, 8, r=2, lora_dropout=0.5, merge_weights=False, rngs=nnx.Rngs(0)))
    x = jnp.ones((4, 6))
    first, second = layer(x), layer(x)
    assert np.any(first != second)  # a new mask at each call
    layer.eval()
    assert not layer.merged
    assert_close(layer(x), x @ (layer.kernel[...] + (layer.lora_B[...] @ layer.lora_A[...]).T / 2) + layer.bias[...])


def test_modes_of_a_model_reach_its_layers():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([make("Linear")[0], nnx.Dropout(0.5, rngs=nnx.Rngs(0))])

    model = Model()
    model.eval()
    assert model.layers[0].merged
    view = nnx.view(model, deterministic=False)
    assert not view.layers[0].merged
    assert model.layers[0].merged
    model.train()
    assert not model.layers[0].merged
    assert nnx.view(model, deterministic=True).layers[0].merged


def test_a_filter_tells_the_adapter_from_the_base():
    layer, _ = make("Linear")
    layer.eval()
    assert set(nnx.state(layer, nnx.Param)) == {"kernel", "bias"}
    assert set(nnx.state(layer, lora.LoraParam)) == {"lora_A", "lora_B"}
    assert isinstance(layer, nnx.Linear)


def test_without_a_rank_it_is_the_plain_layer():
    plain, layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), lora.Linear(6, 8, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(layer(x), plain(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), plain(x))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer))) == {"kernel": (6, 8), "bias": (8,)}


def test_attend_scores_with_the_adapted_table_in_both_modes():
    layer, _ = make("Embedding")
    query = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32))
    table = layer(jnp.arange(7))
    assert_close(layer.attend(query), query @ table.T)
    layer.eval()
    assert_close(layer.attend(query), query @ table.T)


def test_a_layer_in_bfloat16_keeps_its_type():
    layer = filled(lambda: lora.Linear(6, 8, r=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = jnp.ones((2, 6), jnp.bfloat16)
    assert layer.lora_A.dtype == jnp.float32
    assert layer(x).dtype == jnp.bfloat16
    layer.eval()
    assert layer(x).dtype == layer.merged_weight.dtype == jnp.bfloat16
