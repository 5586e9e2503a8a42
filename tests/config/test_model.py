"""Reading config.json: both styles, the released configurations, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import InputError, Phi3Config

SMALL: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


def test_released_configurations(testdata: Path) -> None:
    def read(name: str) -> Phi3Config:
        return Phi3Config.from_pretrained(testdata / "models" / name)

    mini = read("phi-3-mini-4k-instruct")
    assert (mini.head_dim, mini.rotary_dim, mini.sliding_window, mini.rope.is_longrope) == (96, 96, 2047, False)
    assert mini.qkv_sizes == (3072, 3072, 3072)
    medium = read("phi-3-medium-128k-instruct")  # rope type "su", grouped heads, null pad token
    assert medium.rope.is_longrope
    assert medium.qkv_sizes == (5120, 1280, 1280)
    assert medium.rope.attention_factor == 1.1902380714238083
    assert medium.pad_token_id is None
    phi4_mini = read("phi-4-mini-instruct")
    assert (phi4_mini.head_dim, phi4_mini.rotary_dim, phi4_mini.tie_word_embeddings) == (128, 96, True)
    assert read("phi-4").rope.theta == 250000


def test_old_and_new_rope_style_read_the_same() -> None:
    sizes = {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    old = {**SMALL, **sizes, "rope_theta": 5e4, "rope_scaling": {"type": "longrope", **FACTORS}}
    su = {**old, "rope_scaling": {"type": "su", **FACTORS}}
    new = {
        **SMALL,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 5e4, **sizes, **FACTORS},
    }
    configs = [Phi3Config.from_dict(raw) for raw in (old, su, new)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope.theta == 5e4
    assert configs[0].rope.original_max_position_embeddings == 16


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rope_scaling": {"type": "su", **FACTORS}, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "longrope", "attention_factor": 1.5, **FACTORS}},
        {"head_dim": 16, "rope_theta": 123.0, "eos_token_id": [1, 2], "pad_token_id": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
    ],
)
def test_written_and_read_again(extra: dict[str, Any]) -> None:
    config = Phi3Config.from_dict({**SMALL, **extra, "a_key_nobody_knows": 3})
    raw = json.loads(json.dumps(config.to_dict()))
    assert Phi3Config.from_dict(raw) == config
    assert raw["a_key_nobody_knows"] == 3
    assert "su" not in json.dumps(raw["rope_scaling"])


def test_pad_token_null_and_absent_differ() -> None:
    """transformers fills an absent key with its default, 32000, but keeps a null."""
    assert Phi3Config.from_dict(SMALL).pad_token_id == 32000
    assert Phi3Config.from_dict({**SMALL, "pad_token_id": None}).pad_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi3'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of 4"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 2]}}, "short_factor has 2 numbers, expected 4"),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor is None, expected a list of 4 positive numbers"),
        ({"rope_scaling": [1]}, "rope parameters are a list"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Phi3Config.from_dict({**SMALL, **change})
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Phi3Config.from_pretrained(tmp_path)
    for text in ("{", "[1]", "\udc80", "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError):
            Phi3Config.from_pretrained(tmp_path)
