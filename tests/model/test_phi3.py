"""What the model promises without PyTorch at hand; the numbers are compared in tests/parity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.model.documents import default_positions
from phi3_jax.model.dropout import DropoutKey, places_of
from tests.helpers.models import CONFIG


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def test_positions_restart_with_each_document() -> None:
    segments = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    assert default_positions(segments).tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]


def test_dropout_needs_a_key_and_follows_it(model: Phi3ForCausalLM) -> None:
    from dataclasses import replace

    noisy = Phi3ForCausalLM(replace(CONFIG, resid_pdrop=0.5), rngs=nnx.Rngs(0))
    ids = jnp.arange(1, 9)[None]
    np.testing.assert_array_equal(noisy(ids), model(ids))
    first, again, other = (noisy(ids, dropout_key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, model(ids))


def test_rows_of_a_batch_are_dropped_as_in_the_whole() -> None:
    from dataclasses import replace

    noisy = Phi3ForCausalLM(replace(CONFIG, resid_pdrop=0.5), rngs=nnx.Rngs(0))
    ids, key = jnp.arange(1, 17).reshape(2, 8), jax.random.key(0)
    part = DropoutKey(key, places_of(ids.shape)[1:])
    alone, again = (noisy(ids[1:], dropout_key=own) for own in (part, key))
    np.testing.assert_allclose(alone, noisy(ids, dropout_key=key)[1:], atol=1e-5)
    assert not np.allclose(alone, again)


def test_logits_to_keep(model: Phi3ForCausalLM) -> None:
    ids = jnp.arange(1, 9)[None]
    # The head's matrix product is of another shape, so its sums may run in another order.
    np.testing.assert_allclose(model(ids, logits_to_keep=jnp.array([2, 7])), model(ids)[:, [2, 7]], rtol=1e-5)


def test_input_embeddings_replace_the_look_up(model: Phi3ForCausalLM) -> None:
    ids, others = jnp.arange(1, 9)[None], jnp.arange(11, 19)[None]
    np.testing.assert_array_equal(model(ids, inputs_embeds=model.embed(others)), model(others))


def test_one_compilation_a_shape_without_jit(model: Phi3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_jax.model import phi3

    model(jnp.ones((1, 5), jnp.int32))
    before = phi3._forward._cache_size()
    for _ in range(3):
        model(jnp.ones((1, 5), jnp.int32))
    assert phi3._forward._cache_size() == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention_mask": jnp.ones((1, 4)), "segment_ids": jnp.ones((1, 4), jnp.int32)}, "both given"),
        (
            {"attention_mask": jnp.ones((1, 1, 4, 4))},
            r"attention_mask has shape \(1, 1, 4, 4\), expected that of input",
        ),
        ({"segment_ids": jnp.ones((1, 3), jnp.int32)}, r"segment_ids has shape \(1, 3\), expected that of input"),
        ({"input_ids": jnp.ones(4, jnp.int32)}, r"shape \(4,\), expected \[batch, seq\]"),
    ],
)
def test_refused(model: Phi3ForCausalLM, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(kwargs.pop("input_ids", jnp.ones((1, 4), jnp.int32)), **kwargs)


def test_attention_dropout_is_not_silently_left_out() -> None:
    from dataclasses import replace

    model = Phi3ForCausalLM(replace(CONFIG, attention_dropout=0.1), rngs=nnx.Rngs(0))
    model(jnp.ones((1, 4), jnp.int32))
    with pytest.raises(InputError, match="attention_dropout is 0.1"):
        model(jnp.ones((1, 4), jnp.int32), dropout_key=jax.random.key(0))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.optimized
def test_weights_are_never_copied_whole(remat: bool) -> None:
    """A step needs the layer at work beside the stack, not a second stack in another type.

    The bound is half the stack's size: eight layers, of which one or two are unpacked at a time.
    """
    from dataclasses import replace

    config = replace(CONFIG, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    graph, state = nnx.split(nnx.eval_shape(lambda: Phi3ForCausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))

    def loss(embeds: jax.Array, state: Any) -> jax.Array:
        ids = jnp.zeros((1, 4), jnp.int32)
        return nnx.merge(graph, state)(ids, inputs_embeds=embeds, remat=remat).sum()

    embeds = jax.ShapeDtypeStruct((1, 4, 256), jnp.bfloat16)
    memory = jax.jit(jax.grad(loss)).lower(embeds, state).compile().memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < 0.5 * weights
