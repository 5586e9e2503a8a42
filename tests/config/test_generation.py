"""`GenerationConfig`: the checkpoint's own settings, those given over them, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from phi3_jax import InputError
from phi3_jax.config.generation import GenerationConfig
from tests.helpers.models import CONFIG


def config_with(**file: Any) -> Any:
    return replace(CONFIG, generation=json.dumps(file))


def test_generation_config_json_is_the_default_and_arguments_win() -> None:
    file = {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 7,
        "eos_token_id": [4, 9],
        "pad_token_id": 3,
        "max_length": 9,
    }
    settings = GenerationConfig.from_model(config_with(**file), temperature=0.9, top_p=None)
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.9, 7, 1.0)
    assert (settings.eos_token_id, settings.pad_token_id) == ((4, 9), 3)


def test_config_json_has_the_token_ids_where_there_is_no_other() -> None:
    settings = GenerationConfig.from_model(replace(CONFIG, eos_token_id=(5, 6)))
    assert settings.eos_token_id == (5, 6)
    assert settings.pad_id == CONFIG.pad_token_id == 0
    assert GenerationConfig(eos_token_id=[5, 6]).pad_id == 5  # type: ignore[arg-type]


def test_null_for_top_k_means_no_limit() -> None:
    assert GenerationConfig.from_model(config_with(top_k=None)).top_k == 0
    assert GenerationConfig.from_model(config_with()).top_k == 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"temperature": 0}, "temperature is 0, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number above 0 and up to 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most as many answers as it has beams"),
        ({"num_return_sequences": 2}, "all answers would be the same"),
        ({"seed": -1}, "seed is -1"),
        ({"stop_strings": ("",)}, "expected texts that are not empty"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"max_time": 0}, "max_time is 0"),
        ({"temprature": 1}, "unknown generation setting 'temprature'; did you mean 'temperature'"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationConfig.from_model(CONFIG, **settings)


def test_a_change_knows_the_same_names() -> None:
    settings = GenerationConfig(top_k=7, max_time=3.0)
    assert settings.with_(top_p=0.5, max_time=None) == GenerationConfig(top_k=7, top_p=0.5)
    with pytest.raises(InputError, match="unknown generation setting 'topk'; did you mean 'top_k'"):
        settings.with_(topk=3)


def test_what_is_not_implemented_is_not_left_out_in_silence() -> None:
    with pytest.raises(InputError, match="sets no_repeat_ngram_size to 3, which is not implemented"):
        GenerationConfig.from_model(config_with(no_repeat_ngram_size=3))
    GenerationConfig.from_model(config_with(no_repeat_ngram_size=0, typical_p=1.0))
