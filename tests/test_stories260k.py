"""A really trained model, laid out as Phi-3: its documented text, likelihood and logits."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import Phi3ForCausalLM
from phi3_jax.generation import generate


@pytest.fixture(scope="module")
def expected(testdata: Path) -> dict[str, Any]:
    return json.loads((testdata / "checkpoints" / "stories260K" / "expected.json").read_text())


@pytest.fixture(scope="module")
def stories(testdata: Path) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(str(testdata / "checkpoints" / "stories260K"), dtype=jnp.float32)


def test_logits(stories: Phi3ForCausalLM, expected: dict[str, Any]) -> None:
    """The reference is float64, so the bound is float32's rounding through five layers."""
    logits = np.asarray(stories(np.asarray([expected["input_ids"]])))[0]
    for row, (ids, values) in enumerate(
        zip(expected["top5_ids_first32"], expected["top5_logits_first32"], strict=True)
    ):
        np.testing.assert_array_equal(np.argsort(-logits[row])[:5], ids)
        np.testing.assert_allclose(logits[row, ids], values, atol=5e-5)
    np.testing.assert_allclose(logits[-1], expected["full_logits_last_position"], atol=5e-5)


def test_likelihood_of_the_documented_text(stories: Phi3ForCausalLM, expected: dict[str, Any]) -> None:
    ids = np.asarray([expected["input_ids"]])
    logits = np.asarray(stories(ids), np.float64)[0]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    nll = -log_probs[np.arange(len(ids[0]) - 1), ids[0, 1:]]
    np.testing.assert_allclose(nll, expected["per_token_nll"], atol=5e-5)
    assert abs(nll.mean() - 0.457346) < 1e-6


def test_documented_greedy_text(stories: Phi3ForCausalLM, expected: dict[str, Any]) -> None:
    ids = expected["greedy_from_bos_ids"]
    out = generate(stories, jnp.asarray([ids[:1]]), max_new_tokens=len(ids) - 1, eos_token_id=())
    assert out[0].tolist() == ids
