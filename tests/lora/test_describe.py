"""The form of a configuration that is the same for the same adapters."""

import itertools
import re
from typing import Any

import pytest

from phi3_jax import LoraConfig
from phi3_jax.lora.describe import alpha_of, described

ATTENTION = [f"model.layers.{i}.self_attn.qkv_proj" for i in range(3)]
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
OTHERS = ["model.embed_tokens", "lm_head"]


def describe(modules: dict[str, tuple[int, float]], saved: tuple[str, ...] = (), **config: Any) -> LoraConfig:
    return described(LoraConfig(**{"r": 2, "lora_alpha": 8, **config}), modules, 3, saved)


def test_modules_that_all_agree_need_no_pattern():
    config = describe(dict.fromkeys([*ATTENTION, *DOWN, *OTHERS], (2, 8)), layers_to_transform=[0, 1, 2])
    assert config.target_modules == ("down_proj", "embed_tokens", "lm_head", "qkv_proj")
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 8, None, None)
    assert config.layers_to_transform is None


def test_a_module_that_some_layers_lack_is_named_in_full():
    config = describe(dict.fromkeys([*ATTENTION, DOWN[0], DOWN[2]], (2, 8)))
    assert config.target_modules == (DOWN[0], DOWN[2], "qkv_proj")


def test_short_keys_where_layers_agree_and_full_ones_elsewhere():
    ranks = {**dict.fromkeys(ATTENTION, (4, 8)), **dict.fromkeys(DOWN, (2, 8)), "lm_head": (2, 3)}
    config = describe({**ranks, DOWN[1]: (5, 8)})
    assert (config.r, config.rank_pattern) == (2, {"qkv_proj": 4, DOWN[1]: 5})
    assert config.alpha_pattern == {"lm_head": 3}


def test_the_configurations_own_rank_is_kept_among_equals():
    ranks = {**dict.fromkeys(ATTENTION, (2, 8)), **dict.fromkeys(DOWN, (4, 16))}
    assert describe(ranks).r == 2
    assert describe(ranks, r=4, lora_alpha=16).r == 4
    assert describe(ranks, r=7).r == 4  # fits none


@pytest.mark.parametrize("r", [2, 3, 9])
def test_pefts_rule_gives_each_module_its_own_in_any_order(r):
    """The first key that matches counts, and PEFT sorts the keys when it saves."""
    names = [*ATTENTION, *DOWN, "model.layers.1.self_attn.o_proj", *OTHERS]
    ranks = {name: (1 + i % 3, float(i)) for i, name in enumerate(names)}
    ranks["model.layers.11.mlp.down_proj"] = (7, 70.0)  # ends as layer 1 does, but for a digit
    config = describe(ranks, r=r)
    for pattern, place, default in (
        (config.rank_pattern, 0, config.r),
        (config.alpha_pattern, 1, config.lora_alpha),
    ):
        assert pattern is not None
        for name, values in ranks.items():
            found = {value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)}
            assert (found or {default}) == {values[place]}, name


def test_describing_twice_changes_nothing():
    ranks = {**dict.fromkeys(ATTENTION, (4, 8)), DOWN[1]: (5, 1.5), **dict.fromkeys(OTHERS, (2, 8))}
    once = describe(ranks, ("model.norm", "model.layers.mlp.gate_up_proj"))
    again = described(once, {name: once.rank_and_alpha(name) for name in ranks}, 3, ("model.norm",))
    assert {name: once.rank_and_alpha(name) for name in ranks} == ranks
    assert again.rank_pattern == once.rank_pattern
    assert again.alpha_pattern == once.alpha_pattern


def test_names_of_saved_modules_match_them_alone():
    """PEFT takes all modules whose names end so."""
    saved = [
        "model.norm",
        "model.layers.input_layernorm",
        "model.layers.mlp.down_proj",
        "model.embed_tokens",
        "lm_head",
    ]
    config = describe({ATTENTION[0]: (2, 8)}, tuple(saved))
    assert config.modules_to_save == ("embed_tokens", "input_layernorm", "lm_head", "mlp.down_proj", "model.norm")
    everything = [
        *("model.norm", "model.embed_tokens", "lm_head", *DOWN),
        *(f"model.layers.{i}.{norm}" for i in range(3) for norm in ("input_layernorm", "post_attention_layernorm")),
    ]
    assert config.modules_to_save is not None
    matched = {name for name, end in itertools.product(everything, config.modules_to_save) if name.endswith(end)}
    assert matched == {name for name in everything if "post_attention" not in name}


@pytest.mark.parametrize(
    ("r", "alpha", "whole", "expected"), [(3, 5, 9, 15.0), (7, 0.1, 21, 0.3), (16, 32, 48, 96.0), (3, -1, 6, -2.0)]
)
def test_alpha_of_a_scale_at_another_rank(r, alpha, whole, expected):
    config = LoraConfig(r=r, lora_alpha=alpha)
    assert alpha_of(config, config.scaling, whole) == expected


def test_alpha_of_a_scale_with_a_root():
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True)
    assert alpha_of(config, config.scaling, 3) == 5
    assert alpha_of(config, config.scaling, 6) == pytest.approx(5 * 2**0.5, rel=1e-15)
