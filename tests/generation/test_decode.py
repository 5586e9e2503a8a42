"""Greedy decoding: its own rules here; equality with transformers in tests/parity."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.generation import generate
from tests.helpers.models import CONFIG


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def test_each_token_is_the_likeliest_after_what_is_before_it(model: Phi3ForCausalLM) -> None:
    prompt = jnp.asarray([[5, 9, 17, 3]])
    out = generate(model, prompt, max_new_tokens=12, eos_token_id=())
    assert out.shape == (1, 16)
    np.testing.assert_array_equal(out[:, :4], prompt)
    np.testing.assert_array_equal(jnp.argmax(model(out), -1)[:, 3:-1], out[:, 4:])


def test_a_row_does_not_depend_on_its_neighbours(model: Phi3ForCausalLM) -> None:
    short, long = [7, 8], [5, 9, 17, 3, 30]
    alone = generate(model, jnp.asarray([short]), max_new_tokens=8, eos_token_id=())[0, 2:]
    batch = jnp.asarray([[0, 0, 0, *short], long])
    mask = jnp.asarray([[0, 0, 0, 1, 1], [1] * 5])
    together = generate(model, batch, attention_mask=mask, max_new_tokens=8, eos_token_id=())
    np.testing.assert_array_equal(together[0, 5:], alone)


def test_stops_at_an_end_token_and_pads_after_it(model: Phi3ForCausalLM) -> None:
    prompts = jnp.asarray([[5, 9, 17, 3], [6, 1, 2, 44]])
    free = np.asarray(generate(model, prompts, max_new_tokens=10, eos_token_id=()))
    end = int(free[0, 6])  # the third new token of the first row
    assert end not in free[0, 4:6]
    out = np.asarray(generate(model, prompts, max_new_tokens=10, eos_token_id=[end, 10**6], pad_token_id=49))
    assert out[0, 4:7].tolist() == free[0, 4:7].tolist()
    assert set(out[0, 7:].tolist()) <= {49}
    alone = generate(model, prompts[:1], max_new_tokens=10, eos_token_id=end)
    assert alone.shape == (1, 7)  # nothing is decoded once every row has ended


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Hello", r"input_ids are text, 'Hello', and generate takes tokens; .* answer\(model, tokenizer, text\)"),
        (["one", "two"], "input_ids are text, 'one'"),
        ([{"role": "user", "content": "x"}], r"input_ids are messages.* answer\(model, tokenizer, messages\)"),
        ({"input_ids": [[1]], "attention_mask": [[1]]}, r"a tokenizer's dictionary; .* generate\(model, \*\*inputs\)"),
        ({"role": "user"}, "input_ids are messages"),
    ],
)
def test_text_is_refused_with_the_call_that_takes_it(model: Phi3ForCausalLM, given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, given)


@pytest.mark.parametrize(
    ("prompt", "mask", "new", "message"),
    [
        ([[]], None, 4, "prompt is empty"),
        ([[1, 2]], None, 63, "exceed the model's 64 positions"),
        ([[1, 2]], None, 0, "max_new_tokens is 0"),
        ([[1, 2]], [[1, 0]], 4, "padded on the right"),
        ([[1, 50]], None, 4, r"input_ids\[0, 1\]: token id 50 has no row in the model's embedding, which has 50"),
        ([[99, 1], [-1, 2]], [[0, 1], [1, 1]], 4, r"input_ids\[1, 0\]: token id -1 is negative"),
    ],
)
def test_refused(model: Phi3ForCausalLM, prompt: list, mask: list | None, new: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(
            model,
            jnp.asarray(prompt, jnp.int32),
            attention_mask=None if mask is None else jnp.asarray(mask),
            max_new_tokens=new,
        )
