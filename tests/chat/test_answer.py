"""Messages in, text out."""

import pytest
from flax import nnx

import phi3_jax as p3
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.generation.text import Answer, end_token_ids
from phi3_jax.lora import Lora
from phi3_jax.system.errors import InputError
from tests.helpers.models import tiny_model
from tests.helpers.tokenizers import APRIL, PHI_3_5, phi3_tokenizer, phi4_mini_tokenizer

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "one", "parameters": {}}}]


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: tiny_model(vocab_size=600))


@pytest.fixture
def asked(monkeypatch):
    """What `answer_prompts` is asked, which says "four"."""
    seen = []

    def answer_prompts(model, tokenizer, prompts, *, lora, settings):
        seen.append((prompts, lora, settings))
        return iter([(0, Answer("four", (), (), "stop"))])

    monkeypatch.setattr("phi3_jax.chat.answer.answer_prompts", answer_prompts)
    return seen


def test_it_is_the_answer_to_the_templates_prompt(model, asked):
    tokenizer = phi3_tokenizer(PHI_3_5)
    lora = Lora({}, p3.LoraConfig())
    assert p3.answer(model, tokenizer, ASKED, lora=lora, max_new_tokens=6) == "four"
    # A string is what the user says.
    p3.answer(model, tokenizer, "one two", system="Be brief.", lora=lora, max_new_tokens=6)
    p3.answer(model, tokenizer, tuple(ASKED), lora=lora, max_new_tokens=6)
    settings = GenerationConfig.from_model(
        model.config, max_new_tokens=6, num_return_sequences=1, eos_token_id=end_token_ids(tokenizer, model.config)
    )
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert asked == [([prompt], lora, settings)] * 3
    p3.answer(model, tokenizer, ASKED[1:])
    prompt = tokenizer.apply_chat_template(ASKED[1:], add_generation_prompt=True, return_dict=False)
    assert asked[-1][:2] == ([prompt], None)


def test_settings_are_those_of_generate(model, asked):
    tokenizer = phi3_tokenizer(PHI_3_5)

    def settings(**given):
        p3.answer(model, tokenizer, ASKED, **given)
        return asked[-1][2]

    assert not settings().do_sample
    assert settings().max_new_tokens == min(256, model.config.max_position_embeddings // 2)
    # As model cards write greedy decoding.
    assert settings(temperature=0.0, do_sample=False) == settings()
    assert settings(temperature=1.0, top_k=50, do_sample=False) == settings()
    drawn = settings(temperature=0.5, seed=3, stop_strings="x", eos_token_id=7)
    assert (drawn.do_sample, drawn.temperature, drawn.seed, drawn.stop_strings) == (True, 0.5, 3, ("x",))
    assert drawn.eos_token_id == (7,)


def test_tools_reach_the_template(model, asked):
    tokenizer = phi4_mini_tokenizer()
    p3.answer(model, tokenizer, ASKED, tools=TOOLS)
    assert '"description": "one"' in tokenizer.decode(asked[0][0][0])
    with pytest.raises(InputError, match="tools"):
        p3.answer(model, phi3_tokenizer(PHI_3_5), ASKED, tools=TOOLS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "the messages: has no message to answer"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "the messages: has no message to answer"),
        ({"messages": 5}, "the messages: the turns are a int, expected a list of messages"),
        ({"messages": ["x"]}, "the messages, turn 1: is a str"),
        ({"messages": ASKED, "system": "x"}, "system is given, and the messages begin with a system message"),
        ({"messages": ASKED, "num_return_sequences": 2}, "num_return_sequences asks for several answers"),
        ({"messages": ASKED, "temperature": 0.3, "do_sample": False}, "temperature is 0.3, which has no effect with"),
        ({"messages": ASKED, "temperature": 0, "top_p": 2}, "top_p is 2, expected a number from 0 to 1"),
        ({"messages": ASKED, "temperature": 0, "top_p": 0.5}, "top_p is 0.5, which has no effect with temperature 0;"),
        ({"messages": ASKED, "max_size": 5}, "unknown generation setting 'max_size'"),
    ],
)
def test_refused(model, given, message):
    with pytest.raises(InputError, match=message):
        p3.answer(model, phi3_tokenizer(PHI_3_5), **given)


def test_a_tokenizer_without_a_template_is_told(model):
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        p3.answer(model, phi3_tokenizer(None), "x")
    with pytest.raises(InputError, match="no system role"):
        p3.answer(model, phi3_tokenizer(APRIL), "x", system="Be brief.")


def test_paths_in_place_of_what_they_hold_are_told(model, asked):
    with pytest.raises(InputError, match=r"lora is 'out', expected adapters; load them: load_adapter\(path, model\)"):
        p3.answer(model, None, "a question", lora="out")
    with pytest.raises(InputError, match="the model is 'base'; load it: Phi3ForCausalLM.from_pretrained"):
        p3.answer("base", None, "a question")
