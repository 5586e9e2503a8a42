"""`phi3-jax benchmark generate`: what is decoded is what `generate` decodes, and the figures are what they say."""

from typing import Any

import numpy as np
import pytest

from phi3_jax.generation import generate
from phi3_jax.generation.engine import Engine
from phi3_jax.parallel.hardware import Hardware
from phi3_jax.performance import generate as benchmark
from tests.helpers.models import random_lora, tiny_model


def test_decodes_what_generate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a round, chunk by chunk, are those of `generate`; 40 of them are more than one chunk."""
    model = tiny_model()
    lora = random_lora(model)
    decoded: list[np.ndarray] = []
    whole = Engine.decode

    def decode(self: Any, *arguments: Any) -> Any:
        result = whole(self, *arguments)
        decoded.append(np.asarray(result[2])[:, : arguments[-1]])
        return result

    monkeypatch.setattr(Engine, "decode", decode)
    tokens = np.random.default_rng(0).integers(1, 50, (2, 7), np.int32)
    benchmark._round(model, lora, tokens, 41)
    monkeypatch.undo()
    expected = np.asarray(generate(model, tokens, lora=lora, max_new_tokens=41, eos_token_id=()))
    np.testing.assert_array_equal(np.concatenate(decoded, axis=1), expected[:, 8:])


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower first round is compilation; the first token belongs to the prompt; bytes counted by hand."""
    rounds = iter([(5.0, 9.0), (1.0, 2.0), (1.5, 4.0), (1.0, 3.0)])
    monkeypatch.setattr(benchmark, "_round", lambda *_: next(rounds))
    monkeypatch.setattr(benchmark, "hardware", lambda: Hardware(1.0, 1e6, 1, "a test"))
    model = tiny_model()
    figures = benchmark.benchmark_generate(model, None, batch=3, prompt=5, new_tokens=7, rounds=3)
    assert figures["tokens_per_second"] == 3 * 6 / 3.0
    assert figures["token_seconds"] == 3.0 / 6
    assert figures["prompt_seconds"] == 1.0
    assert figures["compile_seconds"] == 14.0 - 4.0
    layer = 32 * (64 + 32) + 3 * 32 * 48 + 2 * 32
    keys_and_values = 3 * (5 + 3) * 2 * 2 * 2 * 8
    assert figures["bytes_per_step"] == 4 * (2 * layer + 32 + 53 * 32 + keys_and_values)
    assert figures["bandwidth_utilisation"] == figures["bytes_per_step"] * 6 / 3.0 / 1e6
