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
        ({"temperature": 0, "do_sample": True}, "temperature is 0, expected a number above 0"),
        ({"temperature": -1}, "temperature is -1, expected a number of at least 0; 0 takes"),
        ({"temperature": -1, "do_sample": True}, "expected a number of at least 0; 0 takes the most likely token"),
        ({"temperature": 1e-45, "do_sample": True}, "temperature is 1e-45, expected a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, expected a number from -10 to 10"),
        ({"max_length": 0}, "max_length is 0, expected a whole number of at least 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number from 0 to 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most as many answers as it has beams"),
        ({"num_return_sequences": 2}, "all answers would be the same"),
        ({"seed": -1}, "seed is -1"),
        ({"stop_strings": ("",)}, "expected texts that are not empty"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"max_time": 0}, "max_time is 0"),
        ({"stop_strings": 5}, "stop_strings are 5"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5, expected token ids"),
        ({"pad_token_id": -1}, "pad_token_id is -1, expected a token id"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"logits_processor": [abs]}, "logits_processor is a list, a setting of transformers that is not implemented"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size is 3, a setting of transformers that is not implemented"),
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
    GenerationConfig.from_model(CONFIG, no_repeat_ngram_size=0, use_cache=True, logits_processor=None)


def test_settings_of_the_draw_say_nothing_where_nothing_is_drawn(caplog: pytest.LogCaptureFixture) -> None:
    """Those of a file are taken in silence, as in transformers; those that somebody gives are named, but for 0."""
    file = config_with(do_sample=False, temperature=0.0, top_p=0.0, typical_p=0.5)
    settings = GenerationConfig.from_model(file)
    assert (settings.temperature, settings.do_sample) == (0.0, False)
    GenerationConfig.from_model(CONFIG, temperature=0.0, do_sample=False)
    assert not caplog.records
    GenerationConfig.from_model(CONFIG, top_k=5, min_p=0.75)
    assert [record.getMessage() for record in caplog.records] == [
        "top_k, min_p: no effect without do_sample, the most likely tokens are taken"
    ]
    with pytest.raises(InputError, match="sets typical_p to 0.5, which is not implemented"):
        GenerationConfig.from_model(file, do_sample=True, temperature=1.0)


def test_an_unknown_setting_of_the_file_is_named(caplog: pytest.LogCaptureFixture) -> None:
    GenerationConfig.from_model(config_with(max_new_token=3, _from_model_config=True, transformers_version="5"))
    assert [record.getMessage() for record in caplog.records] == [
        "generation_config.json: unknown and passed over: max_new_token"
    ]


def test_max_length_counts_the_prompt_where_max_new_tokens_is_not_given(caplog: pytest.LogCaptureFixture) -> None:
    def of_prompt(prompt: int, file: dict[str, Any], **settings: Any) -> int:
        return GenerationConfig.from_model(config_with(**file), **settings).new_tokens(prompt, 100)

    assert of_prompt(4, {}) == 20
    assert of_prompt(90, {}) == 10  # where nobody says how many, the positions do
    assert of_prompt(4, {"max_length": 9}) == 5
    assert of_prompt(4, {"max_length": 9}, max_new_tokens=7) == 7
    assert of_prompt(4, {}, max_length=500) == 96
    assert not caplog.records
    assert of_prompt(4, {"max_new_tokens": 3}, max_length=9) == 3
    assert "max_length has no effect beside generation_config.json's max_new_tokens, 3" in caplog.text
    with pytest.raises(InputError, match="the prompt has 9 tokens, and max_length is 9, which counts the prompt too"):
        of_prompt(9, {"max_length": 9})
