"""The conversation in the terminal: what it keeps, what its commands do, and a real one."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pexpect.fdpexpect import fdspawn
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from phi3_jax import InputError
from phi3_jax.chat import session as session_module
from phi3_jax.chat.commands import converse
from phi3_jax.chat.session import Session, check_name
from phi3_jax.chat.terminal import Plain, Terminal
from phi3_jax.cli import main
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.data.formats import Conversation, Turn, read_row
from phi3_jax.demo import demo_path
from phi3_jax.generation.text import Answer
from phi3_jax.hf.tokenizer import load_tokenizer
from tests.helpers.tokenizers import APRIL, phi3_tokenizer

TOKENIZER = load_tokenizer(demo_path("base"))


class Model:
    """Stands in for a model: says the number of its answer, and keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.asked: list[SimpleNamespace] = []
        self.ends_early: Callable[[], bool] = lambda: False
        monkeypatch.setattr(session_module, "stream_answer", self.answer)
        monkeypatch.setattr(session_module, "answer_with_each", self.answer_each)

    def answer(self, model: Any, tokenizer: Any, prompt: list[int], write: Any, **given: Any) -> Answer:
        self.asked.append(SimpleNamespace(text=tokenizer.decode(prompt), tokens=len(prompt), **given))
        text = "" if self.ends_early() else f"answer {len(self.asked)}"
        write(text)
        return Answer(text, (1, 2), (0.0, 0.0), "stop")

    def answer_each(self, model: Any, tokenizer: Any, prompts: Any, adapters: Any, **given: Any) -> Iterator[Any]:
        for name in reversed(adapters):
            text = f"{name} to {tokenizer.decode(prompts[0])}"
            yield 0, name, Answer(text, (), (), "stop")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


def start(model: Model, tokenizer: Any = TOKENIZER, **given: Any) -> Session:
    notices: list[str] = []
    session = Session(
        model, tokenizer, GenerationConfig(max_new_tokens=20), load=lambda path: path, notice=notices.append, **given
    )
    session.notices = notices
    return session


def silent(text: str) -> None:
    pass


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


def test_settings_change_and_sampling_is_switched_on(model):
    session = start(model)
    session.set("max_new_tokens", 7)
    assert not session.settings.do_sample
    session.set("temperature", 0.7)
    session.set("stop_strings", ["a", "b"])
    assert session.settings == GenerationConfig(
        max_new_tokens=7, temperature=0.7, do_sample=True, stop_strings=("a", "b")
    )
    for name, value, words in [
        ("temprature", 1, "did you mean temperature"),
        ("temperature", 0, "temperature is 0"),
        ("seed", [1, 2], "expected a single value"),
        ("num_return_sequences", 2, "unknown setting"),
    ]:
        with pytest.raises(InputError, match=words):
            session.set(name, value)
    assert session.settings.temperature == 0.7


def test_what_is_saved_is_training_data(model, tmp_path):
    session = start(model, system="Be brief.")
    with pytest.raises(InputError, match="nothing to save"):
        session.save(tmp_path / "chats.jsonl")
    session.say("Zoë?\nYes", silent)
    for _ in range(2):
        session.save(tmp_path / "chats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text("utf-8").splitlines()]
    turns = (Turn("system", "Be brief."), Turn("user", "Zoë?\nYes"), Turn("assistant", "answer 1"))
    assert [read_row(row, "row") for row in rows] == [Conversation(turns)] * 2
    session.save(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text("utf-8")) == rows[0]
    session.save(tmp_path / "one.md")
    assert "**user**\n\nZoë?\nYes" in (tmp_path / "one.md").read_text("utf-8")
    with pytest.raises(InputError, match=r"one\.md exists already"):
        session.save(tmp_path / "one.md")
    with pytest.raises(InputError, match="cannot be written"):
        session.save(tmp_path / "no" / "folder.jsonl")


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


def test_control_characters_do_not_reach_a_terminal(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    evil = "a\tb\r\x1b[31mred\x9b\x07\u202ed [bold]é 👩‍👩‍👧"
    answer = Answer(evil, (), (), "length")

    def run(write: Any, is_stopped: Any) -> Answer:
        for character in evil:
            write(character)
        return answer

    with create_app_session(DummyInput(), DummyOutput()):
        terminal = Terminal(start(model))
    terminal._console = Console(file=io.StringIO(), highlight=False, markup=False, soft_wrap=True, width=80)
    terminal.answer("a\x1b[2J", run)
    terminal.side_by_side(lambda: {"b\x1b": answer})
    terminal.error(InputError("c\x1b"))
    shown = terminal._console.file.getvalue()
    assert "b\\x0d\\x1b[31mred\\x9b\\x07\\u202ed [bold]é 👩‍👩‍👧" in shown
    assert "a\\x1b[2J> a" in shown
    assert set("\r\x1b\x9b\x07\u202e").isdisjoint(shown)
    assert "cut after 0 tokens" in shown


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
        "/quit",
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "none"], "--adapter none has no meaning here"),
        (["--temperature", "0.5", "--no-do-sample"], "--temperature has no effect with --no-do-sample"),
        (["--sytem", "x"], "did you mean --system?"),
    ],
)
def test_wrong_options(options, words, capfd):
    assert main(["chat", "--model", str(demo_path("base")), *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_a_conversation_in_a_real_terminal(tmp_path):
    code = "import sys; from phi3_jax.cli import main; sys.exit(main())"
    options = ["--max-new-tokens", "400", "--temperature", "0.001", "--top-k", "0"]
    argv = ["-c", code, "chat", "--model", str(demo_path("base")), *options]
    # The terminal here answers no questions about the cursor.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    # Not by pexpect itself, which forks: JAX has threads here.
    process = subprocess.Popen(
        [sys.executable, *argv], env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    terminal = fdspawn(ours, encoding="utf-8", timeout=120)
    terminal.expect("you>")
    terminal.send("Hello!\r")
    terminal.expect(r"Hello! How can I help\?")
    terminal.expect("you>")
    # All tokens become as likely as one another, so that the answer hardly ends by itself.
    terminal.send("/set temperature 1000\r")
    terminal.expect(r"\x1b\[2mtemperature 1000")
    terminal.expect("you>")
    terminal.send("Hel\x1b\rlo\r")  # Alt-Enter between
    terminal.expect("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]")  # turns until the first word, long before the last one
    process.send_signal(signal.SIGINT)
    terminal.expect("stopped")
    terminal.expect("you>")
    terminal.send(f"/save {tmp_path / 'chat.json'}\r")
    terminal.expect("saved to")
    terminal.expect("you>")
    terminal.send("\x04")
    assert process.wait(60) == 0
    os.close(ours)
    said = [message["content"] for message in json.loads((tmp_path / "chat.json").read_text())["messages"]]
    assert said[:3] == ["Hello!", "Hello! How can I help?", "Hel\nlo"]
    assert said[3]
    history = tmp_path / "phi3_jax" / "chat_history"
    assert "+Hello!" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
