"""Log-probabilities of continuations, held against those of all logits."""

import jax
import numpy as np
import pytest
from flax import nnx

from phi3_jax import InputError, LoraConfig, Phi3ForCausalLM, generate, init_lora
from phi3_jax.evaluate.likelihood import score_continuations
from tests.helpers.models import CONFIG


def test_scores_are_those_of_all_logits() -> None:
    model = Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"])
    lora = init_lora(model, config, jax.random.key(1))
    rng = np.random.default_rng(0)
    requests = []
    for length, continuation in [(3, 1), (40, 1), (40, 17), (63, 62), (90, 3)]:
        row = rng.integers(3, 50, length + continuation).tolist()
        requests.append((row[:length], row[length:]))
    shared = requests[2]
    requests += [(shared[0], [*shared[1][:-1], last]) for last in range(20)]
    requests.append(([*shared[0], *shared[1][:-3]], shared[1][-3:]))  # the same row, asked for less of it
    best = generate(model, np.array([[5, 6, 7]]), lora=lora, max_new_tokens=6, eos_token_id=())[0].tolist()
    requests.append((best[:3], best[3:]))
    scores = dict(score_continuations(model, requests, lora=lora, batch_size=3))
    assert sorted(scores) == list(range(len(requests)))
    rows = [[*context, *continuation][-65:] for context, continuation in requests]
    ids = np.array([row[:-1] + [0] * (65 - len(row)) for row in rows])
    logits = np.asarray(model(ids, lora=lora), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for index, (row, (_, continuation)) in enumerate(zip(rows, requests, strict=True)):
        own = logprobs[index, len(row) - 1 - len(continuation) : len(row) - 1]
        expected = own[np.arange(len(continuation)), continuation].sum()
        assert scores[index].logprob == pytest.approx(expected, abs=1e-4)
        assert scores[index].is_greedy == (own.argmax(-1).tolist() == continuation)
    assert scores[len(requests) - 1].is_greedy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "context has no token of its own"),
        (([1], []), "continuation has no token of its own"),
        (([1], [2] * 9), "the model reads 8"),
        (([1], [50]), "request 0: token id 50 has no row"),
        (([-2], [1]), "request 0: token id -2 is negative"),
    ],
)
def test_refused_requests(request_: tuple[list[int], list[int]], message: str) -> None:
    model = Phi3ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=message):
        list(score_continuations(model, [request_], max_length=8))
