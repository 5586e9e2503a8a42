from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM, generate
from phi3_jax.lora import ByLayer, Lora, config_targets, init_lora, per_row, weighted_sum
from phi3_jax.lora.tree import unstacked
from phi3_jax.model import phi3

IDS = np.array([[1, 17, 5, 3], [4, 4, 2, 9], [7, 0, 13, 2], [3, 6, 8, 12], [4, 3, 2, 1]])

# Kinds that are computed side by side, and kinds that are chosen between.
PLAIN = {
    "rsLoRA": {"target_modules": ["qkv_proj", "down_proj", "lm_head"], "r": 3, "use_rslora": True},
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "layers and patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"layers.2.mlp.down_proj": 4},
    },
}
OTHERS = {
    "DoRA": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "DoRA in some layers": {"use_dora": True, "layers_to_transform": [1]},
    "PiSSA and token rows": {
        "init_lora_weights": "pissa",
        "trainable_token_indices": {"embed_tokens": [4, 3], "lm_head": [2]},
    },
    "bias on B": {"lora_bias": True, "r": 3},
}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


def trained(model: Phi3ForCausalLM, seed: int = 0, **config: Any) -> Lora:
    """As after some training: nothing is what it was at the start."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], **config}
    shapes = jax.eval_shape(lambda: init_lora(model, LoraConfig(**config), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def assert_rows_are_as_alone(model: Phi3ForCausalLM, loras: list[Lora]) -> None:
    """The last row is the base's."""
    alone = [np.asarray(model(IDS, lora=lora)) for lora in (*loras, None)]
    rows = [*range(len(loras)), -1]
    mixed = np.asarray(model(IDS[: len(rows)], lora=per_row(loras, rows)))
    for i, own in enumerate(alone):
        # The base's rows are those of no adapter: an adapter that did nothing would pass for any.
        assert i == len(loras) or np.abs(own[i] - alone[-1][i]).max() > 0.01
        np.testing.assert_allclose(mixed[i], own[i], rtol=0, atol=1e-6 * np.abs(own).max())


@pytest.mark.parametrize("kinds", [PLAIN, OTHERS], ids=["plain", "others"])
def test_each_row_is_as_with_its_adapter_alone(model, kinds):
    assert_rows_are_as_alone(model, [trained(model, i, **config) for i, config in enumerate(kinds.values())])


def test_by_row_where_embedding_and_head_are_one_table(tiny):
    model = tiny(tie_word_embeddings=True)
    tokens = trained(model, trainable_token_indices=[5, 3])
    assert_rows_are_as_alone(model, [tokens, trained(model, 1, target_modules=["embed_tokens"])])


def test_gradients_are_those_of_the_rows_of_each_adapter(model):
    a, b = trained(model, 0), trained(model, 1)
    rows = np.array([0, 1, 0, -1, 1])
    mixed = jax.grad(lambda loras: jnp.sum(model(IDS, lora=per_row(loras, rows)) ** 2))([a, b])
    alone = jax.jit(jax.grad(lambda lora, own: jnp.sum(model(IDS, lora=lora) ** 2 * own[:, None, None])))
    for i, lora in enumerate((a, b)):
        for ours, expected in zip(jax.tree.leaves(mixed[i]), jax.tree.leaves(alone(lora, rows == i)), strict=True):
            assert np.abs(expected).max() > 0
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.2)])
def test_dropout_by_row(model, rates):
    """Of the adapter's input; a row without an adapter has none."""
    loras = [trained(model, i, target_modules=["lm_head"], lora_dropout=rate) for i, rate in enumerate(rates)]
    x, y = jax.random.normal(jax.random.key(0), (3, 4, 16)), jnp.zeros((3, 4, 19))
    adapter = per_row(loras, [1, -1, 0]).materialise()["lm_head"]
    still, dropped = (np.asarray(adapter(y, x, None, key)) for key in (None, jax.random.key(0)))
    assert np.any(still != dropped, axis=(1, 2)).tolist() == [True, False, True]
    if rates[0] != rates[1]:
        expected = dict(loras[1].items())["lm_head"](y, x, None, jax.random.key(0))[0]
        np.testing.assert_array_equal(dropped[0], expected)


def test_generate_by_row(model):
    loras = [trained(model, seed, r=4, lora_alpha=40) for seed in (1, 2)]
    rows = np.array([1, 0, 0, 1, 0])
    answers = generate(model, IDS, lora=per_row(loras, rows), max_new_tokens=4, eos_token_id=())
    alone = [np.asarray(generate(model, IDS, lora=lora, max_new_tokens=4, eos_token_id=())) for lora in loras]
    np.testing.assert_array_equal(answers, np.where(rows[:, None] == 0, *alone))
    assert np.all(np.any(alone[0] != alone[1], axis=1))


def test_another_adapter_or_other_rows_compile_nothing(model):
    loras = [trained(model, seed, r=5) for seed in (1, 2)]
    first = np.asarray(model(IDS, lora=loras[0]))
    compiled = phi3._forward._cache_size()
    second = np.asarray(model(IDS, lora=loras[1]))
    assert phi3._forward._cache_size() == compiled
    assert np.abs(first - second).max() > 0.01
    for pair, rows in ((loras, [0, 1, 1, 0, 0]), (loras, [1, 1, 0, 0, 1]), (loras[::-1], [1, 0, 0, 1, 1])):
        mixed = np.asarray(model(IDS, lora=per_row(pair, rows)))
        assert phi3._forward._cache_size() == compiled + 1
        is_first = (np.array(rows) == 0) == (pair is loras)
        expected = np.where(is_first[:, None, None], first, second)
        np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_rows_that_cannot_be(tiny, model):
    lora = trained(model)
    for loras, rows, message in (
        ([], [0], "no adapters for the rows"),
        ([lora, lora], [0, 1, 2, 0], "rows has 2, expected 0 to 1 or -1"),
        ([lora, lora], [0, 1, -2, 0], "rows has -2"),
        ([lora], [0.0], "rows is float32 of shape"),
        ([lora], [[0, 0]], r"shape \(1, 2\)"),
        ([lora, trained(model, modules_to_save=["lm_head"])], [0], "to_save has lm_head"),
    ):
        with pytest.raises(InputError, match=message):
            per_row(loras, rows)
    for targets in ("o_proj", "embed_tokens", "lm_head"):
        short = per_row([trained(model, target_modules=[targets])], [0, 0, 0])
        with pytest.raises(InputError, match="rows has 3 entries for a batch of 5 rows"):
            model(IDS, lora=short)
    wide = trained(nnx.eval_shape(lambda: tiny(hidden_size=20)))
    with pytest.raises(InputError, match="o_proj are for weights of .* give adapters of one base"):
        model(IDS, lora=per_row([lora, wide], np.zeros(5, int)))


def test_a_place_that_does_not_exist_is_the_base_where_it_is_traced(model):
    lora = trained(model, target_modules=["lm_head"])
    x, y = jnp.ones((2, 1, 16)), jnp.ones((2, 1, 19))
    out = jax.jit(lambda rows: per_row([lora], rows).materialise()["lm_head"](y, x, None))(jnp.array([7, 0]))
    assert np.any(out != y, axis=(1, 2)).tolist() == [False, True]


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
    with pytest.raises(InputError, match="o_proj starts from LoftQ"):
        weighted_sum([Lora.from_items(loftq, pissa.config)], [1])
