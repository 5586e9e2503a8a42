"""A batch in which each row uses another adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, Phi3ForCausalLM, generate
from phi3_jax.lora import Lora, per_row
from phi3_jax.model import phi3
from tests.helpers.adapters import PLAIN, trained

IDS = np.array([[1, 17, 5, 3], [4, 4, 2, 9], [7, 0, 13, 2], [3, 6, 8, 12], [4, 3, 2, 1]])

# Beside those that are computed side by side (PLAIN), kinds that are chosen between.
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
    mixed = jax.jit(jax.grad(lambda loras: jnp.sum(model(IDS, lora=per_row(loras, rows)) ** 2)))([a, b])
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
