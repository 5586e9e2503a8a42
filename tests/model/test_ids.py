"""Ids that a model is asked to read and has no row for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError
from phi3_jax.model.ids import at_hand, check_input_ids
from tests.helpers.models import VOCAB, tiny_model

PASSES = {
    "logits": lambda model, ids, **more: model(ids, **more),
    "with a cache": lambda model, ids, **more: model(ids, cache=model.make_cache(1, 8), **more)[0],
    "layers": lambda model, ids, **more: model.hidden_states(ids, **more),
    "hidden": lambda model, ids, **more: model.last_hidden_state(ids, **more),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_through_the_model_refuses_them(name):
    model, passed = tiny_model(1), PASSES[name]
    with pytest.raises(InputError, match=r"input_ids\[0, 1\]: token id 53 has no row in the model's embedding"):
        passed(model, jnp.array([[5, VOCAB, 9]]))
    with pytest.raises(InputError, match=r"input_ids\[0, 2\]: token id -1 is negative"):
        passed(model, [[5, 9, -1]])
    padded = np.array([[-1, 5, 9]]), np.array([[0, 1, 1]])
    expected = passed(model, np.array([[0, 5, 9]]), attention_mask=padded[1])
    np.testing.assert_array_equal(passed(model, padded[0], attention_mask=padded[1])[..., 1:, :], expected[..., 1:, :])
    if name == "logits":  # nobody reads them
        embeds = model.embed(jnp.array([[5, 9, 1]]))
        assert passed(model, jnp.full((1, 3), VOCAB), inputs_embeds=embeds).shape == (1, 3, VOCAB)


def test_what_is_compiled_is_not_looked_at():
    seen = []

    def program(ids):
        seen.append(at_hand(ids))
        check_input_ids(VOCAB, ids)
        check_input_ids(VOCAB, np.array([[VOCAB]]), attention_mask=ids)
        return ids

    jax.jit(program)(jnp.array([[VOCAB]]))
    assert seen == [None]


def test_segment_ids_count_more_than_a_mask():
    ids, ones = np.array([[VOCAB, 5]]), np.array([[1, 1]])
    check_input_ids(VOCAB, ids, ones, segment_ids=np.array([[0, 1]]))
    with pytest.raises(InputError):
        check_input_ids(VOCAB, ids, np.array([[0, 1]]), segment_ids=ones)
