"""Weighted sums of adapters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError
from phi3_jax.lora import ByLayer, Lora, config_targets, init_lora, weighted_sum
from phi3_jax.lora.stack import unstacked
from tests.helpers.adapters import PLAIN, trained


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


def deltas(lora: Lora) -> dict[tuple[str, int], np.ndarray]:
    """What each layer's weight is changed by."""
    found = {}
    for name, adapter in lora.items():
        for layer, own in unstacked(adapter) if "layers" in name else [(0, adapter)]:
            found[name, layer] = np.asarray(own.merged(jnp.zeros(())))
    return found


SUMS = {
    "ranks and targets": (PLAIN["rsLoRA"], {"target_modules": ["down_proj", "o_proj"], "r": 2}, 5),
    "slices": (PLAIN["slices"], {"target_modules": ["k_proj", "q_proj"], "r": 3}, 5),
    "layers and patterns": (
        PLAIN["layers and patterns"],
        {"layers_to_transform": [1], "target_modules": ["o_proj", "down_proj"]},
        6,
    ),
    "embeddings": ({"target_modules": ["embed_tokens", "o_proj"]}, {"target_modules": ["embed_tokens"], "r": 4}, 6),
    "PiSSA": ({"target_modules": ["o_proj"], "init_lora_weights": "pissa"}, {"target_modules": ["o_proj"], "r": 3}, 7),
}


@pytest.mark.parametrize("name", SUMS)
def test_cat_is_the_exact_sum(model, name):
    *configs, rank = SUMS[name]
    a, b = (trained(model, seed, **config) for seed, config in enumerate(configs))
    lora = weighted_sum([a, b], [0.5, -2])
    by_a, by_b, total = deltas(a), deltas(b), deltas(lora)
    assert total.keys() == by_a.keys() | by_b.keys()
    for place, delta in total.items():
        expected = 0.5 * by_a.get(place, 0) - 2 * by_b.get(place, 0)
        np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # All of one rank, and the same pytree as a fresh adapter of its own configuration.
    assert (lora.config.r, lora.config.lora_alpha) == (rank, rank)
    fresh = jax.eval_shape(lambda: init_lora(model, lora.config, jax.random.key(0)))
    assert jax.tree.structure(fresh) == jax.tree.structure(lora)


def test_svd_is_the_best_of_its_rank(model):
    """Eckart and Young: the error is the root of the sum of squares of the singular values left out."""
    a, b = (trained(model, r, r=r, target_modules=["o_proj", "lm_head"]) for r in (3, 2))
    exact = deltas(weighted_sum([a, b], [1, 0.7]))
    for rank, given in ((3, None), (2, 2), (5, 5), (20, 20)):
        lora = weighted_sum([a, b], [1, 0.7], "svd", svd_rank=given)
        assert {adapter.rank for _, adapter in lora.items()} == {rank} == {lora.config.r}
        for place, near in deltas(lora).items():
            left_out = np.linalg.svd(exact[place], compute_uv=False)[rank:]
            error = np.linalg.norm(near - exact[place])
            assert error == pytest.approx(np.sqrt(np.sum(left_out**2)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_of_one_adapter_it_is_the_multiple(model, kind):
    lora = trained(model)
    double = weighted_sum([lora], [-2], kind)
    assert double.config.r == lora.config.r
    expected = deltas(lora)
    for place, delta in deltas(double).items():
        np.testing.assert_allclose(delta, -2 * expected[place], atol=1e-6)


def test_layers_of_a_sum(model):
    a = trained(model, layers_to_transform=[0])
    b = trained(model, layers_to_transform=[2], target_modules=["o_proj", "down_proj"])
    lora = weighted_sum([a, b], [1, 1])
    found = dict(lora.items())
    assert isinstance(found["model.layers.self_attn.o_proj"], ByLayer)
    layers = {module.suffix: module.layers for module in config_targets(model, lora.config)}
    assert layers == {"o_proj": (0, 2), "down_proj": (2,)}
    assert {name.rpartition(".")[2]: adapter.layers for name, adapter in found.items()} == {
        "o_proj": ((0, 2),),
        "down_proj": ((2,),),
    }


def test_sums_that_cannot_be(tiny, model):
    a = trained(model, target_modules=["o_proj", "qkv_proj"])
    with pytest.raises(InputError, match="no adapters to sum"):
        weighted_sum([], [])
    with pytest.raises(InputError, match="1 weights for 2 adapters"):
        weighted_sum([a, a], [1])
    with pytest.raises(InputError, match="weights have nan"):
        weighted_sum([a, a], [1, float("nan")])
    with pytest.raises(InputError, match="'ties', expected 'cat', 'linear' or 'svd'"):
        weighted_sum([a, a], [1, 1], "ties")
    with pytest.raises(InputError, match="svd_rank is 4 with combination_type 'cat'"):
        weighted_sum([a, a], [1, 1], svd_rank=4)
    with pytest.raises(InputError, match="one rank, but theirs are 2, 5"):
        weighted_sum([a, trained(model, r=5)], [1, 1], "linear")
    other = trained(model, rank_pattern={"o_proj": 1}, target_modules=["o_proj", "qkv_proj"])
    with pytest.raises(InputError, match="one rank, but o_proj has 1 and 2"):
        weighted_sum([a, other], [1, 1], "linear")
    with pytest.raises(InputError, match="qkv_proj has an adapter, and in another so has q_proj"):
        weighted_sum([a, trained(model, target_modules=["q_proj"])], [1, 1])
    with pytest.raises(InputError, match="o_proj has a DoRA adapter"):
        weighted_sum([a, trained(model, use_dora=True)], [1, 1])
    with pytest.raises(InputError, match="embed_tokens has trained token rows"):
        weighted_sum([a, trained(model, trainable_token_indices=[3])], [1, 1])
    with pytest.raises(InputError, match="modules_to_save has lm_head"):
        weighted_sum([a, trained(model, modules_to_save=["lm_head"])], [1, 1])
    table = trained(model, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="lora_bias in one adapter and embed_tokens in another"):
        weighted_sum([trained(model, lora_bias=True), table], [1, 1])
    with pytest.raises(InputError, match="bases of 2 and of 3 layers"):
        weighted_sum([a, trained(nnx.eval_shape(lambda: tiny(num_hidden_layers=2)))], [1, 1])
    with pytest.raises(InputError, match=r"o_proj are for weights of \(16, 16\) and \(20, 16\)"):
        weighted_sum([a, trained(nnx.eval_shape(lambda: tiny(hidden_size=20)))], [1, 1])
    pissa = trained(model, init_lora_weights="pissa")
    loftq = {name: replace(adapter, in_base=True) for name, adapter in pissa.items()}
    with pytest.raises(InputError, match="o_proj was initialised by LoftQ"):
        weighted_sum([Lora.from_items(loftq, pissa.config)], [1])
