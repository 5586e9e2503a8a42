"""Where a conversation is shown."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from typing import Any

import pytest
from pexpect.fdpexpect import fdspawn
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from phi3_jax import InputError
from phi3_jax.chat.terminal import Terminal
from phi3_jax.demo import demo_path
from phi3_jax.generation.text import Answer
from tests.helpers.conversations import Model, start


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch, positions=100)


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
