"""Messages on their way to the model."""

import pytest

from phi3_jax import InputError
from phi3_jax.chat.prompt import chat_prompt
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.turns import Turn
from tests.helpers.conversations import Model, silent, start
from tests.helpers.tokenizers import APRIL, phi3_tokenizer


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


def test_a_template_without_the_role_is_told(model):
    tokenizer = phi3_tokenizer(APRIL)
    with pytest.raises(InputError, match="the model's chat template has no system role"):
        start(model, tokenizer, system="Be brief.")
    session = start(model, tokenizer)
    with pytest.raises(InputError, match="no system role"):
        session.set_system("Be brief.")
    session.say("one", silent)
    assert session.system is None
    with pytest.raises(InputError, match="no chat template"):
        start(model, phi3_tokenizer(None))


def test_a_question_that_opens_its_answer_is_the_prompt_with_the_system_message_of_the_last():
    # As Mistral's: no cue, and what the system says in the last question alone, while this is the last.
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' }}{% if loop.last and messages[0].role == "
        "'system' %}{{ messages[0].content + '; ' }}{% endif %}{{ m.content + '<|assistant|>' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = phi3_tokenizer(template)
    turns = (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v"))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    tokens = chat_prompt(ChatTokenizer(tokenizer), turns, "the prompt")
    assert tokens == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(tokens).endswith("s; v<|assistant|>")
