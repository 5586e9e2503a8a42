"""Filters, repetition penalty and beam search against transformers', in float32."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from flax import nnx  # noqa: E402

from phi3_jax import Phi3ForCausalLM  # noqa: E402
from phi3_jax.config.generation import GenerationConfig  # noqa: E402
from phi3_jax.generation.beam import BeamSearch, Hypotheses  # noqa: E402
from phi3_jax.generation.sampling import Sampler, choose, penalize, row_keys, seen_tokens, step_keys, warp  # noqa: E402
from tests.helpers.references import torch_phi3  # noqa: E402

ROWS, PROMPT, NEW, BEAMS = 3, 8, 12, 4
_warp, _start, _step = jax.jit(warp), jax.jit(BeamSearch.start, static_argnums=1), jax.jit(BeamSearch.step)
_unfinished, _finish = jax.jit(BeamSearch.unfinished), jax.jit(BeamSearch.finish, static_argnums=2)


@dataclass(frozen=True)
class Models:
    """The same model twice, and prompts of different length."""

    theirs: Any
    forward: Callable[..., Any]
    prompts: np.ndarray
    mask: np.ndarray

    def their_answers(self, **settings: Any) -> Any:
        return self.theirs.generate(
            torch.tensor(self.prompts),
            attention_mask=torch.tensor(self.mask),
            max_new_tokens=NEW,
            pad_token_id=1,  # of 0 transformers makes the first end token
            return_dict_in_generate=True,
            output_scores=True,
            **{"do_sample": False, "eos_token_id": None, **settings},
        )

    def our_answers(self, **settings: Any) -> Hypotheses:
        """With the whole sequences computed again for each token."""
        config = GenerationConfig(max_new_tokens=NEW, pad_token_id=1, **settings)
        search = BeamSearch.from_settings(config, NEW)
        repeated = partial(np.repeat, repeats=config.num_beams, axis=0)
        tokens, mask = repeated(self.prompts), repeated(self.mask)
        seen = None
        if search.sampler.repetition_penalty is not None:
            seen = seen_tokens(jnp.asarray(self.prompts), jnp.asarray(self.mask), 99)
        state = _start(search, ROWS, seen)
        keys = row_keys(config.seed, ROWS) if config.do_sample else None
        while _unfinished(search, state):
            logits = self.forward(tokens, mask)
            step = None if keys is None else step_keys(keys, state.step)
            state, parents, chosen = _step(search, state, logits, step)
            tokens = np.concatenate([tokens[np.asarray(parents)], np.asarray(chosen)[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        return _finish(search, state, config.num_return_sequences)


def make_models(folder: Path, seed: int) -> Models:
    theirs = torch_phi3(folder, seed=seed, num_hidden_layers=1, num_key_value_heads=2)
    graph, state = nnx.split(Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32))

    @jax.jit
    def run(tokens: Any, mask: Any, length: Any) -> Any:
        return nnx.merge(graph, state)(tokens, attention_mask=mask, logits_to_keep=length[None] - 1)[:, 0]

    def forward(tokens: np.ndarray, mask: np.ndarray) -> Any:
        more = (0, 0), (0, PROMPT + NEW - tokens.shape[1])
        return run(np.pad(tokens, more), np.pad(mask, more), np.asarray(tokens.shape[1]))

    rng = np.random.default_rng(seed)
    prompts, mask = rng.integers(3, 99, (ROWS, PROMPT)), np.ones((ROWS, PROMPT), int)
    for row, padding in ((1, 3), (2, 6)):
        prompts[row, :padding], mask[row, :padding] = 1, 0
    return Models(theirs, forward, prompts, mask)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("model"), 3)


def check_equal(ours: Hypotheses, theirs: Any) -> list[int]:
    """Tokens and scores; the lengths, for tests to see that ends were met."""
    new = theirs.sequences[:, PROMPT:].numpy()
    tokens = np.asarray(ours.tokens).reshape(-1, NEW)
    np.testing.assert_array_equal(tokens[:, : new.shape[1]], new)
    assert int(jnp.max(ours.lengths)) == new.shape[1]
    np.testing.assert_allclose(np.ravel(ours.scores), theirs.sequences_scores.numpy(), rtol=1e-5)
    return np.ravel(ours.lengths).tolist()


def common_tokens(models: Models) -> list[int]:
    """Those that a beam search without end tokens meets the most."""
    free = models.their_answers(num_beams=BEAMS, num_return_sequences=BEAMS).sequences[:, PROMPT:].numpy()
    return np.argsort(-np.bincount(free[:, 2:-2].ravel()), kind="stable").tolist()


def check_beam_search(models: Models, ends: list[int], early_stopping: bool | str, length_penalty: float) -> Any:
    settings = {
        "num_beams": BEAMS,
        "num_return_sequences": 1 if len(ends) == 1 else BEAMS,
        "eos_token_id": ends,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
    }
    theirs = models.their_answers(**settings)
    lengths = check_equal(models.our_answers(**settings), theirs)
    return theirs.sequences.numpy().tobytes(), lengths


def test_beam_search(models: Models) -> None:
    """Over ways to stop and length penalties, with ends that are met at different lengths."""
    settings = [(True, 1.0), (True, -1.0), (False, 1.0), (False, 0.0), (False, 3.0), ("never", 1.0)]
    ends = common_tokens(models)[:6]
    outcomes, lengths = zip(*[check_beam_search(models, ends, *each) for each in settings], strict=True)
    assert len(set(outcomes)) > 3  # the settings do matter
    assert len({length for each in lengths for length in each}) > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_beam_search_over_many_settings(seed: int, tmp_path: Path) -> None:
    models = make_models(tmp_path, seed)
    common = common_tokens(models)
    for count in (1, 2, 5):
        for early_stopping in (True, False, "never"):
            for length_penalty in (1.0, 0.0, -1.0, 0.3, 3.0):
                check_beam_search(models, common[:count], early_stopping, length_penalty)


def test_repetition_penalty_of_beams_and_their_logprobs(models: Models) -> None:
    """The penalty is on the search alone."""
    settings = {"num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 1.4}
    theirs = models.their_answers(**settings)
    ours = models.our_answers(**settings)
    check_equal(ours, theirs)
    mask = torch.tensor(np.repeat(np.pad(models.mask, ((0, 0), (0, NEW)), constant_values=1), 2, axis=0))
    with torch.no_grad():
        logits = models.theirs(theirs.sequences, attention_mask=mask).logits[:, PROMPT - 1 : -1]
    logprobs = torch.log_softmax(logits, -1).gather(2, theirs.sequences[:, PROMPT:, None])[..., 0]
    np.testing.assert_allclose(np.reshape(ours.logprobs, (-1, NEW)), logprobs, atol=1e-5)


def test_sampled_beams(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise of our keys in place of torch's: filters, what is drawn and what becomes of it."""
    keys, steps = row_keys(11, ROWS), iter(range(NEW))

    def multinomial(probs: Any, num_samples: int) -> Any:
        step = step_keys(keys, next(steps))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (probs.shape[1],)))(step)
        return torch.topk(torch.log(probs) + torch.tensor(np.asarray(noise)), num_samples)[1]

    settings = {
        "num_beams": BEAMS,
        "num_return_sequences": 2,
        "eos_token_id": common_tokens(models)[:2],
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
    }
    monkeypatch.setattr(torch, "multinomial", multinomial)
    theirs = models.their_answers(**settings)
    lengths = check_equal(models.our_answers(seed=11, **settings), theirs)
    assert len(set(lengths)) > 1


def filters(beams: int) -> Iterator[dict[str, Any]]:
    if beams > 1:  # where each filter is to leave some tokens
        ways = [(0.7, 1, 1.0, 0.0), (0.7, 0, 1e-6, 0.0), (0.7, 0, 1.0, 0.7)]
    else:
        ways = list(itertools.product((0.7,), (0, 1, 5, 40), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.02, 0.7)))
        ways.append((1.0, 5000, 0.99, 0.0))
    for temperature, top_k, top_p, min_p in ways:
        yield {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_filters(models: Models, ties: bool, beams: int) -> None:
    """In transformers' own list of processors, which also says how many tokens each filter is to leave."""
    logits = np.random.default_rng(0).normal(0, 3, (20, 701)).astype(np.float32)
    logits[:4] *= 0.05  # a nucleus beyond the first candidates
    if ties:
        logits = np.round(logits * 2) / 2
    order: Callable[[Any], Any] = np.sort if ties else np.asarray  # which of equals torch takes is not defined
    for settings in filters(beams):
        config = transformers.GenerationConfig(do_sample=True, num_beams=beams, **settings)
        config._eos_token_tensor = torch.tensor([5, 6])
        processors = models.theirs._get_logits_processor(config, input_ids_seq_length=1)
        expected = processors(torch.zeros((20, 1), dtype=torch.long), torch.tensor(logits)).numpy()
        ours = GenerationConfig(do_sample=True, num_beams=beams, eos_token_id=(5, 6), **settings)
        found = _warp(jnp.asarray(logits), Sampler.from_settings(ours))
        np.testing.assert_allclose(order(found), order(expected), rtol=1e-6, err_msg=str(settings))


def test_a_nucleus_that_ends_exactly_at_a_border() -> None:
    """As many of equal tokens are left as there: its sums and its border, in float32."""
    ours = partial(GenerationConfig, do_sample=True, top_k=0)
    shares = [0.1, 0.2, 0.3, 0.35, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 1 / 3, 1 / 7]
    equals = np.array([2, 3, 5, 7, 10, 15, 20, 21, 25, 28, 40, 63])[:, None]
    logits = np.where(np.arange(701) < equals, 1.5, -np.inf).astype(np.float32)
    for top_p in shares:
        theirs = transformers.TopPLogitsWarper(top_p)(None, torch.tensor(logits))
        found = np.asarray(_warp(jnp.asarray(logits), Sampler.from_settings(ours(top_p=top_p))))
        np.testing.assert_array_equal(np.isfinite(found).sum(1), theirs.isfinite().sum(1), err_msg=str(top_p))


def test_repetition_penalty(models: Models) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (ROWS, 99)).astype(np.float32)
    prompts, mask = torch.tensor(models.prompts), torch.tensor(models.mask)
    config = transformers.GenerationConfig(repetition_penalty=1.7)
    processors = models.theirs._get_logits_processor(
        config, input_ids_seq_length=PROMPT, model_kwargs={"attention_mask": mask}
    )
    expected = processors(prompts, torch.tensor(logits)).numpy()
    seen = seen_tokens(jnp.asarray(models.prompts), jnp.asarray(models.mask), 99)
    np.testing.assert_allclose(penalize(jnp.asarray(logits), seen, 1.7), expected, rtol=1e-6)
    tokens, _ = choose(jnp.asarray(logits), Sampler(repetition_penalty=jnp.asarray(1.7)), None, seen)
    np.testing.assert_array_equal(tokens, expected.argmax(-1))
