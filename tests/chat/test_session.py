"""The conversation in the terminal: what it keeps, what its commands do, and a real one."""

import io
import re

import pytest

from phi3_jax import InputError
from phi3_jax.chat.commands import converse
from phi3_jax.chat.session import Session, check_name
from phi3_jax.chat.terminal import Plain
from tests.helpers.conversations import TOKENIZER, Model, silent, start


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


def contents(session: Session) -> list[str]:
    return [turn.content for turn in session.turns]


def test_each_message_is_asked_with_all_that_was_said(model):
    session = start(model, system="Be brief.")
    written: list[str] = []
    session.say("one", written.append)
    session.say("two", written.append)
    assert written == ["answer 1", "answer 2"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "two"},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.asked[1].text == text.replace(">\n", ">")  # which its special tokens swallow
    session.reset()
    session.say("three", silent)
    assert "two" not in model.asked[2].text
    assert "Be brief." in model.asked[2].text


def test_each_answer_draws_anew_and_a_retry_takes_the_place_of_the_last(model):
    session = start(model)
    session.say("one", silent)
    session.say("two", silent)
    session.retry(silent)
    assert contents(session) == ["one", "answer 1", "two", "answer 3"]
    assert model.asked[2].text == model.asked[1].text
    assert len({asked.settings.seed for asked in model.asked}) == 3
    again = start(model)
    again.say("one", silent)
    assert model.asked[3].settings.seed == model.asked[0].settings.seed


def test_a_conversation_that_outgrows_the_positions_forgets_its_oldest_turns(model):
    session = start(model)
    for number in range(8):
        session.say(f"message {number} of some more words", silent)
    assert all(asked.tokens <= 80 for asked in model.asked)
    assert "message 0" not in model.asked[-1].text
    assert "message 6" in model.asked[-1].text
    # Said once for each time that more is left out; what was said is still there to be saved.
    assert 0 < len(session.notices) < 8
    assert "outgrown the model's 100 positions" in session.notices[0]
    assert contents(session)[0].startswith("message 0")


def test_a_message_that_is_too_long_by_itself_is_refused_and_taken_back(model):
    session = start(model)
    session.say("one", silent)
    with pytest.raises(InputError, match=r"the message has \d+ tokens; .* leave room for 80"):
        session.say("too long " * 40, silent)
    assert contents(session) == ["one", "answer 1"]
    assert session.forgotten == 0


def test_a_message_with_a_token_that_the_model_has_no_row_for_is_refused_and_taken_back(model):
    session = start(model)
    session.say("one", silent)
    model.config.vocab_size = max(TOKENIZER("one")["input_ids"]) + 1
    with pytest.raises(InputError, match=r"the message: token '.*' has id \d+, and the model's embedding has"):
        session.say("Zoë, 100 kites", silent)
    assert contents(session) == ["one", "answer 1"]


def test_a_stopped_answer_is_kept_unless_there_is_nothing_of_it(model):
    session = start(model)
    session.say("one", silent, lambda: True)
    assert contents(session) == ["one", "answer 1"]
    model.ends_early = lambda: True
    session.say("two", silent, lambda: True)
    session.retry(silent, lambda: True)
    assert contents(session) == ["one", "answer 1"]
    assert "taken back" in session.notices[0]


def test_adapters_are_switched_loaded_and_compared(model):
    session = start(model, adapters={"a": "A", "b": "B"})
    session.say("one", silent)
    session.switch("b")
    session.say("two", silent)
    session.load("c", "path/to/c")
    session.say("three", silent)
    assert [asked.lora for asked in model.asked] == ["A", "B", "path/to/c"]
    answers = session.compare("four")
    assert list(answers) == ["base", "c"]
    assert answers["c"].text.endswith("answer 3<|end|><|user|>four<|end|><|assistant|>")
    # Without a text the last message again, without its answer.
    assert "three" in session.compare()["base"].text
    assert "answer 3" not in session.compare()["base"].text
    assert contents(session)[-1] == "answer 3"
    session.switch("none")
    with pytest.raises(InputError, match=r"the base answers now; .*\(a, b, c\)"):
        session.compare("four")
    with pytest.raises(InputError, match="there is no adapter d; there are a, b, c, none"):
        session.switch("d")
    with pytest.raises(InputError, match="there is an adapter a already"):
        session.load("a", "elsewhere")


def test_a_name_that_an_adapter_cannot_have():
    with pytest.raises(InputError, match="cannot be called base"):
        check_name("base", {})


def talk(session: Session, *lines: str) -> str:
    out = io.StringIO()
    converse(session, Plain(io.StringIO("".join(line + "\n" for line in lines)), out))
    return out.getvalue()


def test_lines_from_a_pipe(model, capsys, tmp_path):
    session = start(model, adapters={"a": "A"})
    out = talk(
        session,
        "one",
        "",
        "two\\",
        "lines",
        "/system Be brief.",
        "/set temperature 0.5",
        "//etc",
        "/adapter none",
        "/adapter a",
        "/compare x",
        f"/save {tmp_path / 'c.jsonl'}",
        "/retry",
        "/reset",
        "/exit",
        "not asked",
    )
    assert out.startswith("answer 1\nanswer 2\nanswer 3\nbase> base to ")
    assert out.endswith("answer 4\n")
    assert "\na> a to " in out
    assert "two\nlines" in model.asked[1].text
    assert "<|user|>/etc<|end|>" in model.asked[2].text
    assert model.asked[2].settings.temperature == 0.5
    assert session.turns == []
    errors = capsys.readouterr().err.splitlines()
    assert "temperature 0.5, do_sample true" in errors
    assert errors[-1] == "forgotten"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/sett x 1", "unknown command /sett; did you mean /set?"),
        ("/adapter b", "there is no adapter b"),
        ("/compare", "no adapter to compare"),
        ("/retry", "nothing has been said yet"),
        ("/set temperature", "has no value"),
        ("/set stop_strings [a", "is no value"),
        ("/save", "needs a file's name"),
        ("bad \udcff", "not UTF-8"),
    ],
)
def test_an_error_ends_a_pipe(line, words, model):
    with pytest.raises(InputError, match=re.escape(words)):
        talk(start(model), line, "not asked")
    assert model.asked == []
