import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError, LoraConfig
from phi3_jax.lora import LoraEmbedding, config_targets, eva_init, init_lora
from phi3_jax.lora.eva import _distributed, _Source
from phi3_jax.lora.stack import unstacked
from phi3_jax.lora.targets import checkpoint_name
from phi3_jax.quant import quantize_model

KEY = jax.random.key(0)
SEEN = np.random.default_rng(1).random((3, 14)) < 0.8


def batch(seed: int = 0) -> dict[str, Any]:
    """Two packed documents in a row, then padding; some tokens no targets."""
    segments = np.repeat([[1] * 5 + [2] * 7 + [0] * 2], 3, axis=0)
    positions = np.where(segments == 2, np.arange(14) - 5, np.arange(14)) * (segments > 0)
    ids = np.random.default_rng(seed).integers(1, 19, segments.shape)
    return {"input_ids": ids, "segment_ids": segments, "positions": positions, "loss_mask": SEEN.astype(int)}


def config(**entries: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj"], "init_lora_weights": "eva", **entries}
    return LoraConfig(**settings)


def start(model, batches, **entries):
    """`eva_init` on batches that end early, of which it warns."""
    with pytest.warns(UserWarning, match="ended after"):
        return eva_init(model, config(**entries), batches, KEY)


def rows(lora) -> dict[tuple[str, int], np.ndarray]:
    """A of each module's layers."""
    return {
        (name.rpartition(".")[2], layer): own.lora_A
        for name, adapter in lora.items()
        if name.startswith("model.layers.")
        for layer, own in unstacked(adapter)
    }


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


@pytest.fixture(scope="module")
def reference(model):
    return start(model, [batch()])


def qkv_inputs(model, data) -> np.ndarray:
    """What qkv_proj is given in every layer, [L, B, T, hidden], by the model's own hidden states."""
    arguments = {name: data[name] for name in ("segment_ids", "positions")}
    hidden = np.asarray(model.hidden_states(data["input_ids"], **arguments))[:-1].astype(np.float64)
    rms = np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
    weight = np.asarray(model.model.layers.input_layernorm.weight[...])
    return hidden / rms * weight[:, None, None]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_A_is_the_principal_components_of_the_inputs_that_count(model, quantization):
    if quantization:
        model = quantize_model(model, quantization)
    data = batch()
    counted = (data["segment_ids"] > 0) & SEEN
    lora = start(model, [data])
    explained, directions, roots = [], [], []
    for inputs in qkv_inputs(model, data):
        x = inputs[counted] - inputs[counted].mean(axis=0)
        _, s, v = np.linalg.svd(x)
        explained.append(s**2 / np.sum(x**2))
        directions.append(v)
        roots.append(np.sqrt(s[:, None]))
    # Ranks: the 3 · 4 components that explain most of their own layer, at most r · rho in a layer.
    best = np.argsort(-np.array(explained)[:, :8].ravel())[:12]
    ranks = np.bincount(best // 8, minlength=3)
    found = rows(lora)
    assert [len(found["qkv_proj", layer]) for layer in range(3)] == ranks.tolist()
    assert len(set(ranks)) > 1
    for (_, layer), a in found.items():
        expected = directions[layer][: len(a)]
        expected *= np.sign(np.sum(expected * a, axis=1, keepdims=True))
        np.testing.assert_allclose(a, expected, atol=5e-5)  # neighbours in the spectrum mix by float32's rounding
        # PEFT's sign: the largest entry is positive.
        assert np.all(np.take_along_axis(a, np.abs(a).argmax(axis=1)[:, None], axis=1) > 0)
    whitened = rows(start(model, [data], eva_config={"whiten": True}))
    for (name, layer), a in whitened.items():
        np.testing.assert_allclose(a * roots[layer][: len(a)], found[name, layer], rtol=1e-4, atol=1e-5)


def test_the_result_changes_nothing_and_says_what_it_is(model):
    lora = start(model, [batch()], target_modules=["qkv_proj", "down_proj"], eva_config={"rho": 1.25})
    found = rows(lora)
    assert sum(map(len, found.values())) == 6 * 4
    assert max(map(len, found.values())) == 5  # r · rho
    for name, adapter in lora.items():
        for layer, own in unstacked(adapter):
            r, alpha = lora.config.rank_and_alpha(checkpoint_name(name, layer))
            # adjust_scaling_factors: α/r stays what it was.
            assert (own.rank, own.scaling, alpha) == (r, 1.5, 1.5 * r)
            assert own.lora_B.shape[1] == r
            assert not np.any(own.lora_B)
    assert lora.config.init_lora_weights == "eva"
    assert lora.config.eva_config == {"rho": 1.25}
    plain = LoraConfig(**{**vars(lora.config), "init_lora_weights": True, "eva_config": None})
    fresh = jax.eval_shape(lambda: init_lora(model, plain, KEY))
    assert jax.tree.map(jnp.shape, fresh.adapters) == jax.tree.map(jnp.shape, lora.adapters)


def test_scales_and_ranks_that_stay(model):
    fixed = start(model, [batch()], eva_config={"adjust_scaling_factors": False})
    assert fixed.config.alpha_pattern is None
    ranks = {adapter.rank: adapter.scaling for adapter in dict(fixed.items())["model.layers.self_attn.qkv_proj"].parts}
    assert len(ranks) > 1
    assert ranks == {rank: 6 / rank for rank in ranks}
    even = start(model, [batch()], eva_config={"rho": 1})
    assert {len(a) for a in rows(even).values()} == {4}


def test_what_does_not_count_changes_nothing(model, reference):
    data = batch()
    reference = rows(reference)
    labels = {name: data[name] for name in ("input_ids", "segment_ids", "positions")}
    labels["labels"] = np.where(SEEN, data["input_ids"], -100)
    junk = {**data, "input_ids": np.where(data["segment_ids"] > 0, data["input_ids"], 5)}
    for same in (labels, junk):
        for place, a in rows(start(model, [same])).items():
            np.testing.assert_array_equal(a, reference[place])
    everything = rows(start(model, [data], eva_config={"use_label_mask": False}))
    without = {name: data[name] for name in ("input_ids", "segment_ids", "positions")}
    no_mask = rows(start(model, [labels], eva_config={"use_label_mask": False}))
    for found in (rows(start(model, [without])), no_mask):
        for place, a in found.items():
            np.testing.assert_array_equal(a, everything[place])
    assert any(a.shape != reference[p].shape or np.abs(a - reference[p]).max() > 0.01 for p, a in everything.items())
    other = {**labels, "labels": np.where(SEEN, data["input_ids"], -7)}
    for place, a in rows(start(model, [other], eva_config={"label_mask_value": -7})).items():
        np.testing.assert_array_equal(a, reference[place])


def test_slices_of_one_layer_share_its_components(model):
    lora = start(model, [batch()], target_modules=["q_proj", "v_proj", "down_proj"])
    found = rows(lora)
    for layer in range(3):
        q, v = found["q_proj", layer], found["v_proj", layer]
        assert len(q) in (len(v), len(v) + 1)  # the first goes first where the last of the ranks is given
        np.testing.assert_array_equal(q[: len(v)], v)
    assert set(lora.slices) == {f"model.layers.self_attn.{name}" for name in ("q_proj", "v_proj")}


def test_ranks_go_where_they_explain_most():
    sources = {"0.a": _Source(0, "a", 8, {"x": 2, "y": 2}, 3), "1.a": _Source(1, "a", 8, {"z": 2}, 3)}
    explained = {"0.a": np.array([0.5, 0.1, 0.02]), "1.a": np.array([0.3, 0.2, 0.1])}
    assert _distributed(sources, explained, 5) == {"x": 2, "y": 1, "z": 2}
    assert _distributed(sources, explained, 2) == {"x": 1, "y": 1, "z": 0}
    with pytest.raises(InputError, match="inputs of z have no finite variance"):
        _distributed(sources, {**explained, "1.a": np.full(3, np.nan)}, 2)


def test_layers_without_a_rank_are_left_out(tiny):
    model = tiny()
    norms = model.model.layers.input_layernorm.weight
    norms.set_value(norms.get_value().at[1, 3:].set(0))  # layer 1 sees three directions only: they explain it all
    lora = start(model, [batch()], r=1, eva_config={"rho": 2})
    found = {layer: len(a) for (_, layer), a in rows(lora).items()}
    assert found[1] == 2
    assert sum(found.values()) == 3
    (module,) = config_targets(model, lora.config)
    assert set(module.layers) == found.keys()
    assert set(lora.config.target_modules) == {f"model.layers.{layer}.self_attn.qkv_proj" for layer in found}


def test_batches_are_drawn_until_the_components_stay(model):
    for tau in (0.99, 0):
        drawn = itertools.count()
        eva_init(model, config(eva_config={"tau": tau}), (batch() for _ in drawn), KEY)
        assert next(drawn) == 2  # the second time nothing has changed
    drawn = itertools.count()
    eva_init(model, config(eva_config={"tau": 0.9}), (batch(i) for i in drawn), KEY)
    early = next(drawn)
    drawn = itertools.count()
    eva_init(model, config(eva_config={"tau": 0.99}), (batch(i) for i in drawn), KEY)
    assert 2 < early < next(drawn)


def test_a_batch_with_too_few_tokens_passes(model, reference):
    few = {**batch(1), "loss_mask": np.eye(3, 14)}
    expected = rows(reference)
    for place, a in rows(start(model, [few, batch()])).items():
        np.testing.assert_array_equal(a, expected[place])
    with pytest.raises(InputError, match="at least r·rho = 8 tokens that count, but the most is 3"):
        eva_init(model, config(), [few], KEY)


def test_with_other_features(tiny):
    model = tiny(tie_word_embeddings=True)
    lora = start(
        model, [batch()], use_dora=True, target_modules=["lm_head", "embed_tokens"], modules_to_save=["model.norm"]
    )
    found = dict(lora.items())
    head = found["lm_head"]
    np.testing.assert_allclose(head.lora_A @ head.lora_A.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(head.magnitude, np.linalg.norm(model.model.embed_tokens.weight[...], axis=1), rtol=1e-6)
    # As in PEFT the embedding has its usual start, A zero.
    assert isinstance(found["model.embed_tokens"].plain, LoraEmbedding)
    assert not np.any(found["model.embed_tokens"].lora_A)
    assert list(lora.saved) == ["model.norm"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"init_lora_weights": True}, "expected eva; or call init_lora"),
        ({"eva_config": {"rho": 0.5}}, "rho 0.5, expected at least 1"),
        ({"eva_config": {"tau": 1.5}}, "tau 1.5, expected 0 to 1"),
        ({"eva_config": {"whiten": 1}}, "whiten 1, expected true or false"),
        ({"r": 9}, r"r·rho = 18 components of the inputs of qkv_proj, which has 16; lower r"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer"),
    ],
)
def test_settings_that_cannot_be(model, entries, message):
    with pytest.raises(InputError, match=message):
        eva_init(model, config(**entries), [batch()], KEY)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([{"ids": np.ones((1, 2))}], "a batch has ids, expected at least input_ids"),
        ([{"input_ids": np.ones(3, int)}], r"shape \(3,\), expected \[batch, seq\]"),
    ],
)
def test_data_that_cannot_be(model, batches, message):
    with pytest.raises(InputError, match=message):
        eva_init(model, config(), batches, KEY)
