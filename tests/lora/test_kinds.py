"""Every kind of adapter: changes nothing before training, computes what its merged model computes, and
has a gradient in each of its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError, LoraConfig
from phi3_jax.lora import ByLayer, ResidualLora, init_lora, merge_lora, parameter_table, unmerge_lora
from phi3_jax.lora.stack import unstacked
from tests.helpers.adapters import IDS, VARIANTS, config, shaken

BIAS = {"lora_bias": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"1.mlp.down_proj": 1}}


def largest(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# The others are held against PEFT in tests/parity, gradients included.
FEW = ("some slices", "dora on some layers", "olora by layer", "fast pissa", "saved layer", "tokens of both", "bias")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in [*VARIANTS, "bias"]]
)
def test_a_start_changes_nothing_and_everything_trains(tiny, name):
    model = tiny()
    lora = init_lora(model, config(**{**VARIANTS, "bias": BIAS}[name]), jax.random.key(0))
    # What is computed and subtracted again (PiSSA), or divided by itself (DoRA), is equal but for rounding.
    assert largest(model(IDS, lora=lora), model(IDS)) < 2e-5
    moved = shaken(lora)
    grads = jax.jit(jax.grad(lambda lora: jnp.sum(jnp.sin(model(IDS, lora=lora)))))(moved)
    assert largest(model(IDS, lora=moved), model(IDS)) > 1e-2
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        still = "start_" in jax.tree_util.keystr(path)
        assert np.any(np.asarray(grad) != 0) != still, jax.tree_util.keystr(path)


ON_TABLES = ["dora on tables", "saved head", "saved layer", "tokens"]


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in VARIANTS), *((name, True) for name in ON_TABLES)]
)
def test_merged_computes_the_same(tiny, name, tied):
    model = tiny(tie_word_embeddings=tied)
    lora = shaken(init_lora(model, config(**VARIANTS[name]), jax.random.key(0)))
    before = np.asarray(model.model.layers.mlp.down_proj.weight[...])
    merged = merge_lora(model, lora)
    expected = model(IDS, lora=lora)
    assert largest(merged(IDS), expected) < 2e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(model.model.layers.mlp.down_proj.weight[...], before)


def test_tokens_of_a_tied_table_stay_tied(tiny):
    model = tiny(tie_word_embeddings=True)
    lora = shaken(init_lora(model, config(trainable_token_indices=[5, 3]), jax.random.key(0)))
    merged = merge_lora(model, lora)
    assert merged.lm_head is None
    rows = dict(lora.items())["model.embed_tokens"].rows
    np.testing.assert_array_equal(merged.model.embed_tokens.weight[jnp.array([5, 3])], rows)


def test_a_bias_cannot_be_merged(tiny):
    model = tiny()
    lora = init_lora(model, config(**BIAS), jax.random.key(0))
    with pytest.raises(InputError, match="lora_bias cannot be merged"):
        merge_lora(model, lora)


@pytest.mark.parametrize("name", ["dora", "tokens", "saved head"])
def test_what_cannot_be_taken_out_again(tiny, name):
    model = tiny()
    lora = init_lora(model, config(**VARIANTS[name]), jax.random.key(0))
    with pytest.raises(InputError, match="keep the base"):
        unmerge_lora(merge_lora(model, lora), lora)


def test_slices_and_layers_are_taken_out_again(tiny):
    model = tiny()
    lora = shaken(init_lora(model, config(**VARIANTS["slices of some layers"]), jax.random.key(0)))
    restored = unmerge_lora(merge_lora(model, lora), lora)
    assert largest(restored(IDS), model(IDS)) < 2e-5


def test_a_pissa_adapter_as_a_plain_one(tiny):
    """Twice the rank, against the untouched base."""
    model = tiny()
    lora = shaken(init_lora(model, config(init_lora_weights="pissa"), jax.random.key(0)))
    adapter = lora.adapters["model"]["layers"]["mlp"]["down_proj"]
    assert isinstance(adapter, ResidualLora)
    plain = adapter.as_plain()
    assert plain.lora_A.shape == (3, 4, 28)
    for layer in range(3):
        one, whole = (jax.tree.map(lambda x, i=layer: x[i], part) for part in (plain, adapter))
        weight = model.model.layers.mlp.down_proj.weight[layer]
        np.testing.assert_allclose(one.merged(weight), whole.merged(weight), atol=2e-6)


def test_pissa_starts_from_the_largest_directions(tiny):
    """s B A is the best approximation of its rank: the rest of the weight has the other singular values."""
    model = tiny()
    lora = init_lora(model, config(init_lora_weights="pissa"), jax.random.key(0))
    for layer, adapter in unstacked(lora.adapters["model"]["layers"]["mlp"]["down_proj"]):
        weight = np.asarray(model.model.layers.mlp.down_proj.weight[layer])
        rest = weight - adapter.scaling * adapter.start_B @ adapter.start_A
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(np.linalg.svd(rest, compute_uv=False)[:-2], values[2:], rtol=1e-4)
        np.testing.assert_allclose(
            np.linalg.norm(adapter.start_B, axis=0), np.linalg.norm(adapter.start_A, axis=1), rtol=1e-4
        )


def test_the_arrays_of_differing_layers_are_those_that_train(tiny):
    model = tiny()
    lora = init_lora(model, config(**VARIANTS["ranks by layer"]), jax.random.key(0))
    o_proj = lora.adapters["model"]["layers"]["self_attn"]["o_proj"]
    assert isinstance(o_proj, ByLayer)
    assert o_proj.layers == ((0, 2), (1,))
    assert [part.lora_A.shape for part in o_proj.parts] == [(2, 2, 16), (1, 1, 16)]
    assert [layer for layer, _ in unstacked(o_proj)] == [0, 2, 1]
    # qkv [32, 16] and gate_up [56, 16] at rank 2, o [16, 16] at 2, 1, 2 and down [16, 28] at 4
    assert parameter_table(model, lora).trainable == 3 * 2 * (48 + 72) + 5 * 32 + 3 * 4 * 44


def test_seven_llama_names_on_phi3_mini(abstract_phi3_mini):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    make = lambda key: init_lora(abstract_phi3_mini, LoraConfig(r=16, target_modules=names), key)  # noqa: E731
    lora = jax.eval_shape(make, jax.random.key(0))
    table = parameter_table(abstract_phi3_mini, lora)
    assert table.trainable == 29_884_416
    assert {row.module.rpartition(".")[2] for row in table.rows} == set(names)


def test_what_trains_is_counted_as_peft_counts(tiny):
    """The constants of PiSSA do not train; saved modules and token rows do."""
    model = tiny()
    plain = parameter_table(model, init_lora(model, config(), jax.random.key(0))).trainable
    pissa = init_lora(model, config(init_lora_weights="pissa"), jax.random.key(0))
    assert parameter_table(model, pissa).trainable == plain
    more = config(modules_to_save=["lm_head"], trainable_token_indices=[3])
    assert parameter_table(model, init_lora(model, more, jax.random.key(0))).trainable == plain + 19 * 16 + 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 17}, "r is 17, but init_lora_weights pissa finds only 16 directions in"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias is not for embeddings"),
        ({"target_modules": ["embed_tokens"], "init_lora_weights": "olora"}, "olora is not for embeddings"),
        ({"trainable_token_indices": [19]}, "trainable_token_indices has 19, but model.embed_tokens has 19 rows"),
        ({"trainable_token_indices": {"norm": [1]}}, "trainable_token_indices names norm; expected embed_tokens"),
        (
            {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
            "trainable_token_indices trains rows of model.embed_tokens, which target_modules gives an adapter",
        ),
        ({"init_lora_weights": "eva"}, "eva_init"),
        ({"init_lora_weights": "loftq"}, "loftq_init"),
    ],
)
def test_what_cannot_be_made(tiny, settings, message):
    with pytest.raises(InputError, match=message) as error:
        init_lora(tiny(), config(**settings), jax.random.key(0))
    assert "\n" not in str(error.value)


def test_dora_on_a_tied_head_with_trained_tokens(tiny):
    both = config(use_dora=True, target_modules=["lm_head"], trainable_token_indices=[1])
    with pytest.raises(InputError, match="PEFT cannot run DoRA on such a head"):
        init_lora(tiny(tie_word_embeddings=True), both, jax.random.key(0))


def test_other_tokens_for_a_tied_head(tiny):
    with pytest.raises(InputError, match="lm_head, which shares the embedding's table"):
        init_lora(tiny(tie_word_embeddings=True), config(trainable_token_indices={"lm_head": [1]}), jax.random.key(0))
