"""Cached decoding against transformers' `generate`, token for token, in float32."""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from phi3_jax import Phi3ForCausalLM  # noqa: E402
from phi3_jax.generation import generate  # noqa: E402
from phi3_jax.peft.adapter import load_adapter  # noqa: E402
from tests.helpers.references import longrope, torch_phi3  # noqa: E402

LENGTHS = (12, 7, 3)

# Every kind of configuration, combined in turn: heads that share keys, windows, LongRoPE and a part of
# the dimensions rotated, tables that are one, other activations.
KINDS = [
    {**heads, **window, **rope, **head}
    for (heads, window, rope), head in zip(
        itertools.product(
            ({"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}),
            ({}, {"sliding_window": 6}, {"sliding_window": 40}),
            ({}, longrope(8, 16, 96), longrope(8, 48, 96), {"partial_rotary_factor": 0.5}),
        ),
        itertools.cycle(({}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"})),
        strict=False,
    )
]


def left_padded(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    mask = (np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]).astype(int)
    return np.random.default_rng(seed).integers(3, 99, mask.shape) * mask, mask


def one_by_one(model: Any, prompts: np.ndarray, mask: np.ndarray, **settings: Any) -> list[np.ndarray]:
    """transformers' answers; it takes LongRoPE's factors for the whole batch, so each row alone."""
    answers = []
    for row, real in zip(prompts, mask, strict=True):
        alone = torch.tensor(row[real == 1])[None]
        out = model.generate(
            alone, attention_mask=torch.ones_like(alone), **{"do_sample": False, "pad_token_id": 0, **settings}
        )
        answers.append(out[:, alone.shape[1] :].numpy())
    return answers


def random_adapter(base: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def check_greedy(folder: Path, adapted: bool, new: int, **overrides: Any) -> None:
    theirs = torch_phi3(folder, max_position_embeddings=96, **overrides) if "rope_scaling" not in overrides else None
    theirs = theirs or torch_phi3(folder, **overrides)
    ours, lora = Phi3ForCausalLM.from_pretrained(str(folder), dtype=jnp.float32), None
    if adapted:
        theirs = random_adapter(theirs, folder / "adapter")
        lora = load_adapter(folder / "adapter", ours)
    prompts, mask = left_padded()
    expected = one_by_one(theirs, prompts, mask, max_new_tokens=new, eos_token_id=None)
    settings = {"lora": lora, "max_new_tokens": new, "eos_token_id": ()}
    together = np.asarray(generate(ours, prompts, attention_mask=mask, **settings))
    np.testing.assert_array_equal(together[:, prompts.shape[1] :], np.concatenate(expected))
    alone = np.asarray(generate(ours, prompts[:1], **settings))
    np.testing.assert_array_equal(alone[:, prompts.shape[1] :], expected[0])


@pytest.mark.parametrize(
    "overrides",
    [{"num_key_value_heads": 2}, {"sliding_window": 6}, {**longrope(8), "tie_word_embeddings": True}],
    ids=["gqa", "window", "longrope"],
)
def test_greedy(overrides: dict[str, Any], tmp_path: Path) -> None:
    """LongRoPE's original length, 16, is crossed on the way, by the rows at different times."""
    check_greedy(tmp_path, False, 20, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_sixty_four_tokens_of_every_kind_of_model(kind: int, tmp_path: Path) -> None:
    check_greedy(tmp_path, kind % 2 == 1, 64, seed=kind, **KINDS[kind])


@pytest.mark.slow
def test_across_position_4096(tmp_path: Path) -> None:
    """At the length at which Phi-3's LongRoPE models change their factors, single and in a batch."""
    overrides = {**longrope(8, 4096, 8192), "num_hidden_layers": 2}
    theirs = torch_phi3(tmp_path, **overrides)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    rng = np.random.default_rng(0)
    prompts, mask = rng.integers(3, 99, (2, 4090)), np.ones((2, 4090), int)
    prompts[1, :5], mask[1, :5] = 0, 0
    expected = one_by_one(theirs, prompts, mask, max_new_tokens=24, eos_token_id=None)
    out = np.asarray(generate(ours, prompts, attention_mask=mask, max_new_tokens=24, eos_token_id=()))
    np.testing.assert_array_equal(out[:, 4090:], np.concatenate(expected))


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


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ({"sliding_window": 6}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}),
        (longrope(8), {"num_beams": 4, "early_stopping": True, "repetition_penalty": 1.3}),
    ],
    ids=["window", "longrope"],
)
def test_beam_search(overrides: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """The beams' caches move with them, over the window and the change of LongRoPE's factors."""
    theirs = torch_phi3(tmp_path, **overrides)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    prompts, mask = left_padded()
    # transformers takes a padding token of 0 for none.
    settings = {**settings, "max_new_tokens": 18, "eos_token_id": [7, 50, 51, 52], "pad_token_id": 98}
    answers = settings.get("num_return_sequences", 1)
    expected = one_by_one(theirs, prompts, mask, **settings)
    result = generate(ours, prompts, attention_mask=mask, return_dict_in_generate=True, **settings)
    for row, answer in enumerate(expected):
        mine = result.sequences[row * answers : (row + 1) * answers, prompts.shape[1] :]
        np.testing.assert_array_equal(mine[:, : answer.shape[1]], answer)
        assert np.all(mine[:, answer.shape[1] :] == 98)


def test_repetition_penalty_and_log_probabilities(tmp_path: Path) -> None:
    theirs = torch_phi3(tmp_path)
    ours = Phi3ForCausalLM.from_pretrained(str(tmp_path), dtype=jnp.float32)
    prompts, mask = left_padded()
    settings = {"max_new_tokens": 16, "repetition_penalty": 1.5}
    expected = np.concatenate(one_by_one(theirs, prompts, mask, eos_token_id=None, **settings))
    result = generate(ours, prompts, attention_mask=mask, eos_token_id=(), return_dict_in_generate=True, **settings)
    np.testing.assert_array_equal(result.sequences[:, prompts.shape[1] :], expected)
    whole_mask = np.pad(mask, ((0, 0), (0, 16)), constant_values=1)
    logits = np.asarray(ours(result.sequences, attention_mask=whole_mask), np.float64)[:, 11:-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs, expected[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, chosen, rtol=0, atol=1e-5)
    assert result.finish_reasons == ("length",) * 3
