"""Stop strings end answers where transformers' `StopStringCriteria` does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import StopStringCriteria  # noqa: E402

from phi3_jax.demo import demo_path  # noqa: E402
from phi3_jax.generation.stop import StopStrings  # noqa: E402
from phi3_jax.hf.tokenizer import load_tokenizer  # noqa: E402
from tests.helpers.tokenizers import JULY, PHI_4, phi3_tokenizer, phi4_tokenizer  # noqa: E402

STRINGS = ("the", "\n\n", " a", "é", "<|end|>", "e t", "12")
TEXT = "So the cat\n\n ate 12 the at é at a then<|end|> he"


def position(criteria: Any, prompt: list[int], answer: list[int]) -> int:
    """How many tokens of the answer transformers keeps, -1 for all."""
    for end in range(1, len(answer) + 1):
        if criteria(torch.tensor([[*prompt, *answer[:end]]]), None)[0]:
            return end
    return -1


def check(tokenizer: Any, seed: int, rows: int = 40) -> None:
    rng = np.random.default_rng(seed)
    known = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for strings in (STRINGS[:1], STRINGS[1:3], STRINGS[3:5], STRINGS[5:]):
        criteria = StopStringCriteria(tokenizer, list(strings))
        found = 0
        for _ in range(rows):
            # Pieces of the text, so that stop strings come up, and random tokens between them.
            start = rng.integers(len(known))
            mixed = [*known[start : start + 6], *rng.integers(0, len(tokenizer), 2), *rng.permutation(known)[:8]]
            prompt, answer = [int(t) for t in mixed[:3]], [int(t) for t in mixed[3:]]
            (kept,) = StopStrings(tokenizer, strings, [prompt])(np.array([answer]))
            assert kept == position(criteria, prompt, answer), (strings, tokenizer.convert_ids_to_tokens(mixed))
            found += kept >= 0
        assert found > 0


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "demo"])
def test_positions(kind: str) -> None:
    if kind == "demo":
        tokenizer = load_tokenizer(demo_path("base"))
    else:
        tokenizer = phi3_tokenizer(JULY) if kind == "sentencepiece" else phi4_tokenizer(PHI_4)
    check(tokenizer, seed=0)


@pytest.mark.slow
def test_positions_with_phi_3s_tokenizer(testdata: Path) -> None:
    check(load_tokenizer(testdata / "models" / "phi-3-mini-4k-instruct"), seed=1)
