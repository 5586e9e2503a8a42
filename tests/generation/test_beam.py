"""Beam search on a toy model, against all the answers there are. Equality with transformers is in tests/parity."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.beam import BeamSearch, BeamState, Hypotheses
from phi3_jax.generation.sampling import row_keys, step_keys

VOCAB, NEW, STATES = 4, 4, 53
# The toy model: a state, changed by each token, has its logits. It stands for the cache.
TABLE = jnp.asarray(np.random.default_rng(5).normal(0, 1.5, (STATES, VOCAB)), jnp.float32)


def advance(cache: Any, token: Any) -> Any:
    return (cache * 5 + token + 1) % STATES


def search(prompts: list[int], steps: int | None = None, **settings: Any) -> Hypotheses:
    """The answers to prompts, which are states of the toy model; after `steps` the search is broken off."""
    config = GenerationConfig(**{"max_new_tokens": NEW, "pad_token_id": 9, **settings})
    beams = BeamSearch.from_settings(config, config.max_new_tokens)
    return _search(beams, jnp.asarray(prompts), steps or NEW + 1, config.num_return_sequences)


def _search(beams: BeamSearch, prompts: jax.Array, steps: int, answers: int) -> Hypotheses:
    def unfinished(carry: tuple[BeamState, jax.Array]) -> jax.Array:
        return beams.unfinished(carry[0]) & (carry[0].step < steps)

    def step(carry: tuple[BeamState, jax.Array]) -> tuple[BeamState, jax.Array]:
        state, cache = carry
        state, parents, tokens = beams.step(state, TABLE[cache])
        return state, advance(cache[parents], tokens)

    start = beams.start(len(prompts)), jnp.repeat(prompts, beams.beams)
    state, _ = jax.lax.while_loop(unfinished, step, start)
    return beams.finish(state, answers)


_search = jax.jit(_search, static_argnums=3)
_step = jax.jit(BeamSearch.step)


def logprobs(prompt: int, tokens: tuple[int, ...]) -> list[float]:
    found, cache = [], prompt
    for token in tokens:
        row = np.asarray(TABLE[cache], np.float64)
        found.append(float(row[token] - np.log(np.exp(row).sum())))
        cache = advance(cache, token)
    return found


def all_answers(prompt: int, ends: tuple[int, ...], length_penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every answer with its score, the best first."""
    answers = set()
    for tokens in itertools.product(range(VOCAB), repeat=NEW):
        end = next((i for i, token in enumerate(tokens) if token in ends), NEW - 1)
        answers.add(tokens[: end + 1])
    scored = [(sum(logprobs(prompt, tokens)) / len(tokens) ** length_penalty, tokens) for tokens in answers]
    return sorted(scored, reverse=True)


def answers(found: Hypotheses, row: int) -> list[tuple[int, ...]]:
    return [tuple(t[:n].tolist()) for t, n in zip(np.asarray(found.tokens[row]), found.lengths[row], strict=True)]


@pytest.mark.parametrize("ends", [(1,), (0, 2)])
def test_with_beams_enough_the_best_answers_of_all(ends: tuple[int, ...]) -> None:
    firsts = set()
    for length_penalty in (1.0, 0.0, -2.0, 4.0):
        settings = {"num_beams": 27, "num_return_sequences": 5, "early_stopping": "never"}
        found = search([3, 17], length_penalty=length_penalty, eos_token_id=ends, **settings)
        for row, prompt in enumerate((3, 17)):
            best = all_answers(prompt, ends, length_penalty)[:5]
            assert answers(found, row) == [tokens for _, tokens in best]
            np.testing.assert_allclose(found.scores[row], [score for score, _ in best], rtol=1e-5)
            firsts.add(best[0][1])
            for i, (_, tokens) in enumerate(best):
                rest = NEW - len(tokens)
                np.testing.assert_allclose(found.logprobs[row, i], logprobs(prompt, tokens) + [0] * rest, rtol=1e-5)
                assert found.tokens[row, i, len(tokens) :].tolist() == [9] * rest
    assert {len(tokens) for tokens in firsts} >= {1, NEW}  # short and long ones were the best


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(early_stopping: bool) -> None:
    settings = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": (1,), "early_stopping": early_stopping}
    prompts = list(range(12))
    together = search(prompts, **settings)
    lengths = set()
    for row in prompts:
        alone = search([row] * 12, **settings)  # the same program
        assert answers(together, row) == answers(alone, 0)
        np.testing.assert_array_equal(together.scores[row], alone.scores[0])
        lengths |= set(alone.lengths[0].tolist())
    assert len(lengths) > 2


def test_a_search_that_is_left_early_answers_with_its_running_beams() -> None:
    settings = {"steps": 2, "num_beams": 16, "num_return_sequences": 3}
    found = search([3], eos_token_id=(VOCAB,), **settings)
    pairs = itertools.product(range(VOCAB), repeat=2)
    best = sorted(pairs, key=lambda tokens: -sum(logprobs(3, tokens)))[:3]
    assert answers(found, 0) == best
    np.testing.assert_allclose(found.scores[0], [sum(logprobs(3, tokens)) / 2 for tokens in best], rtol=1e-5)
    # An answer that was there already is not lost.
    end = max(range(VOCAB), key=lambda token: logprobs(3, (token,)))
    ended = search([3], eos_token_id=(end,), length_penalty=0.0, **settings)
    assert answers(ended, 0)[0] == (end,)
    assert all(len(tokens) == 2 for tokens in answers(ended, 0)[1:])


def test_sampled_beams_are_drawn_without_replacement() -> None:
    """Pairs of answers of one token, against the probability that both are drawn, in either order."""
    draws, temperature = 20_000, 0.7
    config = GenerationConfig(max_new_tokens=1, num_beams=2, do_sample=True, temperature=temperature, top_k=0)
    beams = BeamSearch.from_settings(config, config.max_new_tokens)
    logits = jnp.tile(TABLE[3], (draws * 2, 1))
    state, _, _ = _step(beams, beams.start(draws), logits, step_keys(row_keys(1, draws), 0))
    found = beams.finish(state, 2)
    assert bool(jnp.all(found.scores[:, 0] >= found.scores[:, 1]))
    pairs = np.sort(np.asarray(found.tokens[:, :, 0]), axis=1)
    counts = [int(np.sum((pairs == pair).all(1))) for pair in itertools.combinations(range(VOCAB), 2)]
    assert sum(counts) == draws
    p = np.exp(np.asarray(TABLE[3], np.float64) / temperature)
    p /= p.sum()
    wanted = [p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in itertools.combinations(range(VOCAB), 2)]
    assert chisquare(counts, np.asarray(wanted) * draws).pvalue > 1e-3


def test_where_filters_leave_too_few_answers_the_best_is_repeated() -> None:
    config = GenerationConfig(
        max_new_tokens=1, num_beams=4, num_return_sequences=4, do_sample=True, top_k=1, length_penalty=0.0
    )
    beams = BeamSearch.from_settings(config, config.max_new_tokens)
    state, _, _ = _step(beams, beams.start(1), jnp.tile(TABLE[3], (4, 1)), row_keys(0, 1))
    found = beams.finish(state, 4)
    likeliest = np.argsort(-np.asarray(TABLE[3]))[:2].tolist()  # one to end with and one to go on with are always left
    assert answers(found, 0) == [(likeliest[i],) for i in (0, 1, 0, 0)]
