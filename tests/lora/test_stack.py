"""Adapters that differ by layer, as one stacked adapter."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.lora import ByLayer, DoraEmbedding, DoraLinear, LoraEmbedding, LoraLinear, ResidualLora
from phi3_jax.lora.stack import num_layers, parts_of, rescaled, stacked, unstacked


def numbers(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


A, B = numbers(2, 4), numbers(3, 2, seed=1)
KINDS = {
    "plain": LoraLinear(A, B, 0.5),
    "bias": LoraLinear(A, B, 0.5, lora_bias=numbers(3)),
    "residual": ResidualLora(LoraLinear(A, B, 0.5), A + 1, B + 1),
    "dora": DoraLinear(A, B, numbers(3), 0.5),
    "embedding": LoraEmbedding(A, B, 0.5),
    "dora embedding": DoraEmbedding(A, B, numbers(3), 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_is_the_same_update_at_another_scale_and_rank(kind):
    adapter = KINDS[kind]
    other = rescaled(adapter, 2.0, 5)
    inner = other.lora if isinstance(other, ResidualLora) else other
    assert (other.scaling, inner.lora_A.shape, inner.lora_B.shape) == (2.0, (5, 4), (3, 5))
    if isinstance(adapter, LoraEmbedding | DoraEmbedding):
        arguments = numbers(3, 3, seed=2), jnp.array([0, 3, 1]), numbers(4, 3, seed=3), None
    else:
        arguments = numbers(3, 3, seed=2), numbers(3, 4, seed=3), numbers(3, 4, seed=4)
    np.testing.assert_allclose(other(*arguments), adapter(*arguments), rtol=1e-5, atol=1e-6)


def test_rescaled_to_what_it_is_is_the_same_to_the_bit():
    """Of a scale of zero too, by which nothing can be divided."""
    for scaling in (0.5, 0.0):
        adapter = LoraLinear(A, B, scaling)
        np.testing.assert_array_equal(rescaled(adapter, scaling, 2).lora_B, B)


def test_layers_without_an_adapter_are_the_bases():
    """A and B are zero there; DoRA's magnitude is not looked at."""
    one = DoraLinear(A, B, jnp.full(3, 9.0), 0.5)
    adapter = stacked({0: one, 2: replace(one, lora_A=-A)}, 3)
    assert isinstance(adapter, ByLayer)
    assert (num_layers(adapter), [layers for _, layers in parts_of(adapter)]) == (3, [(0, 2)])
    layers = [jax.tree.map(lambda x, i=i: x[i], adapter.materialise()) for i in range(3)]
    y, x, weight = numbers(5, 3, seed=2), numbers(5, 4, seed=3), numbers(3, 4, seed=4)
    np.testing.assert_array_equal(layers[1](y, x, weight), y)
    np.testing.assert_array_equal(layers[1].merged(weight), weight)
    np.testing.assert_array_equal(layers[0](y, x, weight), one(y, x, weight))
    np.testing.assert_array_equal(layers[0].merged(weight), one.merged(weight))


def test_stacked_is_the_reverse_of_unstacked():
    of_two_ranks = {0: LoraLinear(A, B, 0.5), 1: LoraLinear(A[:1], B[:, :1], 0.5), 2: LoraLinear(-A, B, 0.5)}
    adapter = stacked(of_two_ranks, 3)
    again = dict(unstacked(adapter))
    assert again.keys() == of_two_ranks.keys()
    for layer, one in of_two_ranks.items():
        np.testing.assert_array_equal(again[layer].lora_A, one.lora_A)
    alike = stacked({layer: LoraLinear(A, B, 0.5) for layer in range(3)}, 3)
    assert isinstance(alike, LoraLinear)
    assert num_layers(alike) == 3
