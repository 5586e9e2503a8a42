"""The options for how to answer: one for every setting, read as the setting is."""

from dataclasses import fields, replace

import pytest

from phi3_jax import InputError
from phi3_jax.chat.session import SETTINGS
from phi3_jax.cli.generation import add_generation_arguments, generation_settings, given_settings
from phi3_jax.cli.parser import Parser
from phi3_jax.config.generation import OF_CHECKPOINT, GenerationConfig
from phi3_jax.system.compat import option_strings
from tests.helpers.models import CONFIG
from tests.helpers.tokenizers import JULY, phi3_tokenizer


def parser(**more) -> Parser:
    made = Parser("try", "A command.")
    add_generation_arguments(made, "as it is", **more)
    return made


def test_every_setting_has_an_option_with_a_help_text():
    names = [field.name for field in fields(GenerationConfig) if field.name not in OF_CHECKPOINT]
    options = option_strings(parser())
    for name in names:
        assert ("--stop" if name == "stop_strings" else f"--{name.replace('_', '-')}") in options
    assert "Draw each token" in parser().format_help()
    assert "--num-return-sequences" not in option_strings(parser(without=("num_return_sequences",)))
    assert set(names) - set(SETTINGS) == {"num_return_sequences"}


def test_values_are_read_as_the_settings_are():
    given = "--max-new-tokens 3 --max-time 1.5 --no-do-sample --temperature .5 --top-k 7 --seed 4 --stop a --stop b"
    assert given_settings(parser().parse([*given.split(), "--early-stopping", "false", "--num-beams", "2"])) == {
        "max_new_tokens": 3,
        "max_time": 1.5,
        "do_sample": False,
        "temperature": 0.5,
        "top_k": 7,
        "num_beams": 2,
        "early_stopping": False,
        "seed": 4,
        "stop_strings": ["a", "b"],
    }
    assert given_settings(parser().parse([])) == {}


@pytest.mark.parametrize("option", ["--temperature", "--top-k", "--top-p", "--min-p"])
def test_a_setting_of_the_draw_switches_drawing_on(option):
    tokenizer = phi3_tokenizer(JULY)
    settings = generation_settings(parser().parse([option, "1"]), CONFIG, tokenizer, max_new_tokens=9)
    assert (settings.do_sample, settings.max_new_tokens) == (True, 9)
    with pytest.raises(InputError, match=f"{option} has no effect with --no-do-sample"):
        generation_settings(parser().parse([option, "1", "--no-do-sample"]), CONFIG, tokenizer, max_new_tokens=9)


def test_temperature_0_is_the_likeliest_token():
    config = replace(CONFIG, generation='{"do_sample": true, "temperature": 0.7}')
    for given in (["--temperature", "0"], ["--temperature", "0", "--no-do-sample"]):
        settings = generation_settings(parser().parse(given), config, phi3_tokenizer(JULY), max_new_tokens=9)
        assert not settings.do_sample
    with pytest.raises(InputError, match=r"temperature is 0.0, expected a number above 0"):
        generation_settings(
            parser().parse(["--temperature", "0", "--do-sample"]), config, phi3_tokenizer(JULY), max_new_tokens=9
        )


def test_the_checkpoint_is_asked_before_the_command():
    config = replace(CONFIG, generation='{"max_new_tokens": 5}')
    settings = generation_settings(parser().parse([]), config, phi3_tokenizer(JULY), max_new_tokens=9)
    assert (settings.max_new_tokens, settings.num_return_sequences) == (5, 1)
    config = replace(CONFIG, generation='{"max_length": 50}')
    settings = generation_settings(parser().parse([]), config, phi3_tokenizer(JULY), max_new_tokens=9)
    assert (settings.max_new_tokens, settings.new_tokens(5, 64)) == (None, 45)


def test_a_command_without_the_option_gives_one_answer_whatever_the_checkpoint_says():
    config = replace(CONFIG, generation='{"num_return_sequences": 2, "do_sample": true}')
    tokenizer = phi3_tokenizer(JULY)
    chat = parser(without=("num_return_sequences",))
    assert generation_settings(chat.parse([]), config, tokenizer, max_new_tokens=9).num_return_sequences == 1
    assert generation_settings(parser().parse([]), config, tokenizer, max_new_tokens=9).num_return_sequences == 2
