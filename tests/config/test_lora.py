from dataclasses import asdict
from typing import Any

import pytest

from phi3_jax import InputError, LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"use_rslora": 1}, "use_rslora is 1, expected true or false"),
        ({"use_dora": None}, "use_dora is None"),
        ({"lora_bias": "yes"}, "lora_bias is 'yes'"),
        ({"rank_pattern": {"down_proj": 0}}, "rank_pattern gives down_proj 0"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"rank_pattern": {1: 2}}, "rank_pattern has 1, expected names of modules"),
        ({"alpha_pattern": {"down_proj": "4"}}, "alpha_pattern gives down_proj '4'"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights is 'pisa', expected true, false, gaussian, .*pissa"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights is 'pissa_niter_0'"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "init_lora_weights is orthogonal, which needs an even r"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": {"o_proj": 5}},
            "init_lora_weights is orthogonal, which needs an even r",
        ),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is given, but init_lora_weights is True"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "loftq_config has bits; expected loftq_bits"),
        ({"eva_config": {"rho": 1.0}, "init_lora_weights": "gaussian"}, "eva_config is given, but .* gaussian"),
        ({"use_dora": True, "init_lora_weights": "olora"}, "use_dora is true with init_lora_weights olora"),
        ({"use_dora": True, "init_lora_weights": "loftq"}, "use_dora is true with init_lora_weights loftq"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias and peft.use_dora are both true"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias is true with init_lora_weights pissa"),
        ({"bias": "some"}, "bias is 'some', expected 'none', 'all' or 'lora_only'"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying is 'yes', expected true or false"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": [1]}, r"target_modules is \(1,\)"),
        ({"exclude_modules": [1]}, "exclude_modules is"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is"),
        ({"layers_to_transform": [0], "target_modules": ".*o_proj"}, "layers_to_transform is given with an expression"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": "h"}, "layers_pattern is 'h'; .* 'layers'"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices names a token twice"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices is"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "trainable_token_indices trains rows of embed_tokens, which modules_to_save trains as a whole",
        ),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^peft\.{message}") as error:
        LoraConfig(**settings)
    assert "\n" not in str(error.value)


def test_scaling() -> None:
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_lists_sets_and_dictionaries_are_hashable() -> None:
    config = LoraConfig(target_modules={"b", "a", "c"}, rank_pattern={"a": 2}, trainable_token_indices={"lm_head": [1]})  # type: ignore[arg-type]
    assert config.target_modules == ("a", "b", "c")
    same = LoraConfig(**asdict(config))
    assert hash(config) == hash(same)
    assert config == same
    with pytest.raises(TypeError):
        config.rank_pattern["a"] = 3  # type: ignore[index]


def test_what_is_empty_is_not_given() -> None:
    """PEFT writes {} and [] into its files where it means nothing."""
    assert LoraConfig(rank_pattern={}, alpha_pattern={}, exclude_modules=(), modules_to_save=()) == LoraConfig()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.down_proj", (4, 32)),
        ("model.layers.1.mlp.down_proj", (8, 32)),  # the first key that matches counts
        ("model.layers.0.self_attn.o_proj", (16, 5)),
        ("lm_head", (16, 32)),
    ],
)
def test_patterns_match_as_in_peft(name: str, expected: tuple[int, float]) -> None:
    config = LoraConfig(rank_pattern={r"layers\.1\..*": 8, "down_proj": 4, "proj": 2}, alpha_pattern={"o_proj": 5})
    assert config.rank_and_alpha(name) == expected
