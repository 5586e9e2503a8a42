"""Greedy decoding against transformers' `generate`, token for token, in float32."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from phi3_jax import Phi3ForCausalLM  # noqa: E402
from phi3_jax.generation import generate  # noqa: E402
from tests.parity.reference import longrope, torch_phi3  # noqa: E402


@pytest.mark.parametrize(
    "overrides",
    [{"num_key_value_heads": 2}, {"sliding_window": 6}, {**longrope(8), "tie_word_embeddings": True}],
    ids=["gqa", "window", "longrope"],
)
def test_batch_of_left_padded_prompts(overrides: dict[str, Any], tmp_path: Path) -> None:
    """LongRoPE's original length, 16, is crossed on the way."""
    theirs = torch_phi3(tmp_path, **overrides)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    rng = np.random.default_rng(3)
    prompts, mask = rng.integers(3, 99, (3, 12)), np.ones((3, 12), int)
    for row, padding in ((1, 5), (2, 9)):
        prompts[row, :padding], mask[row, :padding] = 0, 0
    out = np.asarray(generate(ours, prompts, attention_mask=mask, max_new_tokens=20, eos_token_id=()))
    for row in range(3):  # one by one: transformers takes LongRoPE's factors for the whole batch
        alone = torch.tensor(prompts[row, mask[row] == 1])[None]
        expected = theirs.generate(alone, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        np.testing.assert_array_equal(out[row, 12:], expected[0, alone.shape[1] :].numpy())


def test_end_tokens(tmp_path: Path) -> None:
    theirs = torch_phi3(tmp_path)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    prompts = np.random.default_rng(0).integers(3, 99, (4, 6))
    free = np.asarray(generate(ours, prompts, max_new_tokens=12, eos_token_id=()))
    ends = [int(free[0, 8]), int(free[1, 10])]
    expected = theirs.generate(
        torch.tensor(prompts), max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    np.testing.assert_array_equal(generate(ours, prompts, max_new_tokens=12, eos_token_id=ends), expected.numpy())
