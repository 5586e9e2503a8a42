"""The next token: what is drawn and how often, and what it does not depend on. Equality with transformers' filters
is in tests/parity."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from phi3_jax import InputError
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.sampling import Sampler, add_seen, choose, penalize, row_keys, seen_tokens, step_keys

DRAWS = 20_000
VOCAB = 300  # more than one block of the draw
_choose = jax.jit(choose)


def sampler(**settings: Any) -> Sampler:
    return Sampler.from_settings(GenerationConfig(do_sample=True, **{"top_k": 0, **settings}))


def expected(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution that the settings define, for logits without equals."""
    order = np.argsort(-logits)
    p = np.exp(logits[order].astype(np.float64) / temperature)
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    shortest = int(np.argmax(np.cumsum(p) >= top_p * (1 - 1e-12))) + 1
    p[shortest:] = 0
    p[p < min_p * p[0]] = 0
    result = np.empty_like(p)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize(
    ("settings", "candidates"),
    [
        ({}, 64),
        ({"temperature": 0.6}, 64),
        ({"top_k": 9}, 64),
        ({"top_p": 0.8}, 64),
        ({"top_p": 0.8}, 8),  # too few, so that the whole vocabulary is sorted
        ({"min_p": 0.05}, 64),
        ({"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.04}, 64),
    ],
    ids=["no filter", "temperature", "top_k", "top_p", "top_p beyond the candidates", "min_p", "all"],
)
def test_draws_follow_the_distribution(settings: dict[str, Any], candidates: int) -> None:
    logits = np.random.default_rng(1).normal(0, 2, VOCAB).astype(np.float32)
    used = replace(sampler(**settings), candidates=candidates)
    tokens, _ = _choose(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), used, row_keys(7, DRAWS))
    counts = np.bincount(tokens, minlength=VOCAB)
    p = expected(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings})
    assert counts[p == 0].sum() == 0
    often = p * DRAWS >= 5  # the rest together, for the test's approximation
    observed, wanted = np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()) * DRAWS
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 5
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Nor on whether one of them needs more than the first candidates, or on its own place."""
    rng = np.random.default_rng(0)
    peaked, flat = rng.normal(0, 4, (50, VOCAB)), rng.normal(0, 0.1, (50, VOCAB))
    used = replace(sampler(top_p=0.7), candidates=32)
    prompts, others = tuple(range(50)), tuple(range(50, 100))
    alone, _ = _choose(jnp.asarray(peaked), used, row_keys(prompts, 50))
    together, _ = _choose(jnp.asarray(np.concatenate([flat, peaked])), used, row_keys(others + prompts, 100))
    np.testing.assert_array_equal(together[50:], alone)
    assert len(set(np.asarray(together[:50]).tolist())) > 30  # the others do use the rest of the vocabulary


def test_the_likeliest_token_is_the_first_of_equals_and_logprobs_are_the_models() -> None:
    logits = np.random.default_rng(0).integers(-3, 4, (40, 30)).astype(np.float32)
    seen = (logits == 3) & (np.arange(30) < 15)
    plain, logprobs = _choose(jnp.asarray(logits), Sampler())
    np.testing.assert_array_equal(plain, np.argmax(logits, -1))
    settings = GenerationConfig(repetition_penalty=1.4, temperature=0.1, top_k=1)  # no filter without do_sample
    other, other_logprobs = _choose(jnp.asarray(logits), Sampler.from_settings(settings), None, jnp.asarray(seen))
    np.testing.assert_array_equal(other, np.argmax(np.where(seen, logits / 1.4, logits), -1))
    assert 0 < seen[np.arange(40), other].sum() < 40
    drawn, drawn_logprobs = _choose(jnp.asarray(logits), sampler(temperature=5.0, top_k=20), row_keys(0, 40))
    reference = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for tokens, found in ((plain, logprobs), (other, other_logprobs), (drawn, drawn_logprobs)):
        np.testing.assert_allclose(found, reference[np.arange(40), tokens], rtol=1e-5)


def test_another_number_is_not_another_program() -> None:
    run = jax.jit(lambda *arguments: choose(*arguments))
    logits, keys = jnp.zeros((2, VOCAB)), row_keys(0, 2)
    for temperature, top_k, top_p, min_p in ((0.5, 50, 0.9, 0.1), (2.0, 7, 0.3, 0.01)):
        run(logits, sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), keys)
    assert run._cache_size() == 1


def test_padding_is_not_seen() -> None:
    ids = jnp.asarray([[0, 0, 5, 3], [4, 0, 3, 3]])
    mask = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1]])
    seen = seen_tokens(ids, mask, 7)
    assert [np.flatnonzero(row).tolist() for row in seen] == [[3, 5], [0, 3, 4]]
    seen = add_seen(seen, jnp.asarray([6, 3]))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[3, 5, 6], [0, 3, 4]]


def test_penalty_lowers_either_sign() -> None:
    logits = jnp.asarray([[2.0, -2.0, 0.0, 1.0]])
    out = penalize(logits, jnp.asarray([[True, True, True, False]]), 4.0)
    np.testing.assert_array_equal(out, [[0.5, -8.0, 0.0, 1.0]])


def test_a_seed_for_each_prompt_goes_with_it() -> None:
    data = lambda keys: jax.random.key_data(keys).tolist()  # noqa: E731
    keys = data(row_keys((3, 8, 5), 3, 2))
    assert keys[2:4] == data(row_keys((8,), 1, 2))
    assert keys[4:6] + keys[:2] == data(row_keys((5, 3), 2, 2))
    one_seed = data(row_keys(3, 3, 2))
    steps = [data(step_keys(row_keys(3, 2, 1), step)) for step in (0, 1)]
    everything = [tuple(key) for key in keys + one_seed + steps[0] + steps[1]]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("seed", "message"),
    [((1, 2), "2 numbers for 3 prompts"), (-1, "seed is -1"), ((1, 2**32, 3), "seed is 4294967296")],
)
def test_seeds_refused(seed: int | tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        row_keys(seed, 3)
