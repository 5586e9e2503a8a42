import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from phi3_jax import LoraConfig
from phi3_jax.lora import init_lora

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 211}
EVERYTHING = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens")


def adapters(model, seed=0, **config):
    lora = init_lora(model, LoraConfig(**{"r": 8, "target_modules": EVERYTHING, **config}), jax.random.key(seed))
    return dict(lora.items())


def assert_drawn_from(values, distribution):
    """Kolmogorov-Smirnov; the draws are fixed, so the bound of 0.1% cannot fail now and then."""
    assert stats.kstest(np.ravel(values), distribution.cdf).pvalue > 1e-3


def uniform(bound):
    return stats.uniform(-bound, 2 * bound)


def test_kaiming_uniform_is_one_over_the_root_of_the_inputs(tiny):
    for name, adapter in adapters(tiny(**WIDE)).items():
        if name == "model.embed_tokens":
            continue
        bound = 1 / np.sqrt(adapter.lora_A.shape[-1])  # √6 / √(1 + 5) / √in
        assert_drawn_from(adapter.lora_A, uniform(bound))
        # A 2.45 times wider one, without the factor for a = √5, would pass no moment test either.
        assert np.std(adapter.lora_A) == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert 0.99 * bound < np.abs(adapter.lora_A).max() <= bound
        assert not np.any(adapter.lora_B)


def test_gaussian_has_the_standard_deviation_one_over_r(tiny):
    made = adapters(tiny(**WIDE), init_lora_weights="gaussian")
    for name in ("model.layers.self_attn.qkv_proj", "lm_head"):
        assert_drawn_from(made[name].lora_A, stats.norm(scale=1 / 8))
        assert not np.any(made[name].lora_B)


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_embeddings_start_with_a_zero_and_b_normal(tiny, start):
    adapter = adapters(tiny(**WIDE), init_lora_weights=start)["model.embed_tokens"]
    assert adapter.lora_A.shape == (8, 211)
    assert adapter.lora_B.shape == (64, 8)
    assert not np.any(adapter.lora_A)
    assert_drawn_from(adapter.lora_B, stats.norm())


def test_false_draws_both(tiny):
    made = adapters(tiny(**WIDE), init_lora_weights=False)
    linear, embedding = made["model.layers.mlp.down_proj"], made["model.embed_tokens"]
    assert_drawn_from(linear.lora_A, uniform(1 / np.sqrt(96)))
    assert_drawn_from(linear.lora_B, uniform(1 / np.sqrt(8)))
    assert_drawn_from(embedding.lora_A, stats.norm())
    assert_drawn_from(embedding.lora_B, stats.norm())


def test_a_fresh_adapter_changes_nothing(tiny):
    model = tiny()
    lora = init_lora(model, LoraConfig(r=4, target_modules=EVERYTHING), jax.random.key(0))
    ids = jnp.array([[3, 7, 0, 5]])
    np.testing.assert_array_equal(model(ids, lora=lora), model(ids))


def test_layers_and_modules_are_drawn_independently(tiny):
    """Correlations of N numbers drawn apart stay within 5/√N; a copy has 1."""
    made = adapters(tiny(**WIDE))
    a = np.asarray(made["model.layers.self_attn.o_proj"].lora_A).reshape(3, -1)
    same_shape = np.asarray(made["model.layers.mlp.gate_up_proj"].lora_A).reshape(3, -1)
    correlations = np.corrcoef(np.concatenate([a, same_shape]))
    assert np.abs(correlations - np.eye(6)).max() < 5 / np.sqrt(a.shape[1])


def test_the_key_decides_and_other_modules_do_not(tiny):
    model = tiny(**WIDE)
    name = "model.layers.self_attn.o_proj"
    a = adapters(model)[name].lora_A
    np.testing.assert_array_equal(a, adapters(model)[name].lora_A)
    np.testing.assert_array_equal(a, adapters(model, target_modules=["o_proj"])[name].lora_A)
    assert np.any(a != adapters(model, seed=1)[name].lora_A)


def test_adapters_are_float32_on_a_bfloat16_base(tiny):
    lora = init_lora(tiny(jnp.bfloat16), LoraConfig(target_modules=EVERYTHING), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(tiny, rslora, scaling):
    config = LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, lora_dropout=0.1, target_modules=["o_proj", "lm_head"])
    for _, adapter in init_lora(tiny(), config, jax.random.key(0)).items():
        assert (adapter.scaling, adapter.dropout) == (scaling, 0.1)


def test_shapes_without_numbers(abstract_phi3_mini):
    lora = jax.eval_shape(lambda key: init_lora(abstract_phi3_mini, LoraConfig(r=16), key), jax.random.key(0))
    made = dict(lora.items())
    assert made["model.layers.self_attn.qkv_proj"].lora_A.shape == (32, 16, 3072)
    assert made["model.layers.mlp.gate_up_proj"].lora_B.shape == (32, 16384, 16)
    assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 25_165_824
