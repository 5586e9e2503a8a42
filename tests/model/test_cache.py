"""Reading on with a cache: the numbers of one pass over everything."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, Phi3ForCausalLM
from phi3_jax.config.model import RopeConfig
from phi3_jax.model.cache import slot_columns
from phi3_jax.quant import quantize_model
from tests.helpers.models import random_lora, tiny_model

LENGTH = 20
PADDING = (0, 4, 7)
LONG = RopeConfig(
    original_max_position_embeddings=6,
    short_factor=(1.0, 1.2, 1.4, 1.6),
    long_factor=(2.0, 3.0, 4.0, 5.0),
    attention_factor=1.2,
)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, 40, (len(PADDING), LENGTH))
    return tokens, (np.arange(LENGTH) >= np.array(PADDING)[:, None]).astype(int)


def read_in_parts(model: Phi3ForCausalLM, parts: list[int], **kwargs: Any) -> tuple[np.ndarray, Any]:
    tokens, mask = inputs()
    cache, logits, start = model.make_cache(len(tokens), LENGTH), [], 0
    for part in parts:
        place = slice(start, start + part)
        given = {"attention_mask": mask[:, place]} if start == 0 else {}
        out, cache = model(tokens[:, place], cache=cache, **given, **kwargs)
        logits.append(out)
        start += part
    assert start == LENGTH
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({}, [9, 1, 1, 4, *[1] * 5]),
        ({"sliding_window": 5}, [9, 1, 1, 4, *[1] * 5]),
        ({"sliding_window": 5}, [8, *[1] * 12]),
        ({"sliding_window": 12}, [9, 8, 1, 1, 1]),
    ],
    ids=["whole", "window", "window_filled_by_single_tokens", "window_of_12"],
)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_logits_are_those_of_one_pass(overrides: dict[str, Any], parts: list[int], adapted: bool) -> None:
    model = tiny_model(2, **overrides)
    lora = random_lora(model) if adapted else None
    tokens, mask = inputs()
    expected = np.asarray(model(tokens, attention_mask=mask, lora=lora))
    logits, cache = read_in_parts(model, parts, lora=lora)
    assert cache.capacity == min(LENGTH, overrides.get("sliding_window", LENGTH))
    is_token = mask == 1
    np.testing.assert_allclose(logits[is_token], expected[is_token], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_quantised_base() -> None:
    model = quantize_model(tiny_model(2, hidden_size=64, head_dim=16), "nf4")
    tokens, mask = inputs()
    expected = np.asarray(model(tokens, attention_mask=mask))
    logits, _ = read_in_parts(model, [9, *[1] * 11])
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16() -> None:
    """Both ways round at other places; so each is as far from the float32 logits as the other."""
    model = tiny_model(2, jnp.bfloat16)
    tokens, mask = inputs()
    graph, state = nnx.split(model)
    exact = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state))
    expected = np.asarray(exact(tokens, attention_mask=mask))[mask == 1]
    cached, whole = (
        np.asarray(logits)[mask == 1] - expected
        for logits in (read_in_parts(model, [9, *[1] * 11])[0], model(tokens, attention_mask=mask))
    )
    assert np.sqrt(np.mean(cached**2)) < 1.1 * np.sqrt(np.mean(whole**2))


def test_longrope_takes_the_factors_of_the_length_so_far() -> None:
    """Prompts on the long side of the change: each token's angles are those of the long factors."""
    model = tiny_model(2)
    model = replace_rope(model, LONG)
    tokens, mask = inputs()
    expected = np.asarray(model(tokens, attention_mask=mask))
    logits, _ = read_in_parts(model, [14, *[1] * 6])
    np.testing.assert_allclose(logits[:, 14:], expected[:, 14:], rtol=0, atol=1e-5 * np.abs(expected).max())


def replace_rope(model: Phi3ForCausalLM, rope: RopeConfig) -> Phi3ForCausalLM:
    model.config = model.model.config = replace(model.config, rope=rope)
    return model


def test_slots_hold_the_newest_columns() -> None:
    """By hand: with three slots, after five columns slot 0 has column 3, slot 1 column 4, slot 2 column 2."""
    assert slot_columns(jnp.asarray(5), 3).tolist() == [3, 4, 2]
    assert slot_columns(jnp.asarray(2), 3).tolist() == [0, 1, -1]


def test_refused() -> None:
    model = tiny_model(2)
    tokens, mask = inputs()
    with pytest.raises(InputError, match="room for 12 columns, 0 of which are taken, and 20 more"):
        model(tokens, cache=model.make_cache(3, 12))
    _, cache = model(tokens[:, :8], attention_mask=mask[:, :8], cache=model.make_cache(3, 12))
    with pytest.raises(InputError, match="only the prompt has padding"):
        model(tokens[:, :2], attention_mask=mask[:, :2], cache=cache)
    with pytest.raises(InputError, match="positions and a cache were both given"):
        model(tokens[:, :2], positions=mask[:, :2], cache=cache)
