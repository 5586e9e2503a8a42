"""Where a conversation is shown: a terminal, or plain lines for a pipe."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3_jax.chat.commands import COMMANDS
from phi3_jax.chat.session import SETTINGS, Session
from phi3_jax.config.names import NONE
from phi3_jax.generation.text import Answer
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import one_line, printable, write_piece

Run = Callable[[Callable[[str], None], Callable[[], bool]], Answer]


class Terminal:
    """A terminal: lines are edited and remembered, and Ctrl-C stops an answer."""

    def __init__(self, session: Session) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._input: PromptSession[str] = PromptSession(
            history=_history(self.notice),
            completer=_Commands(session),
            complete_while_typing=True,
            multiline=True,  # what Enter does is below
            key_bindings=_keys(),
            prompt_continuation=lambda width, line, wrapped: " " * width,
        )

    def read(self) -> str | None:
        while True:
            try:
                return self._input.prompt(FormattedText([("bold", "you> ")]))
            except KeyboardInterrupt:
                continue  # the line is dropped
            except EOFError:
                return None

    def notice(self, text: str) -> None:
        self._console.print(printable(text), style="dim", soft_wrap=False)

    def error(self, error: InputError) -> None:
        self._console.print(one_line(str(error)), style="red", soft_wrap=False)

    def answer(self, name: str, run: Run) -> None:
        label = Text(f"{printable(name)}> ", style="bold cyan")
        waiting = self._console.status("")
        with _no_echo(), _interruptible() as is_stopped:

            def write(text: str) -> None:
                if label:
                    waiting.stop()
                    self._console.print(label, end="")
                    label.truncate(0)
                self._console.out(printable(text), end="", highlight=False)
                self._console.file.flush()

            try:
                with waiting:
                    answer = run(write, is_stopped)
                    write("\n")
            except KeyboardInterrupt:
                self._console.print()
                self.notice("stopped; the message is taken back")
                return
            note = _note(answer, is_stopped())
        if note:
            self.notice(note)

    def side_by_side(self, run: Callable[[], dict[str, Answer]]) -> None:
        try:
            with _no_echo(), self._console.status(""):
                answers = run()
        except KeyboardInterrupt:
            self.notice("stopped")
            return
        table = Table(expand=True)
        for name in answers:
            table.add_column(Text(printable(name)), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(answer.text.strip("\n"))) for answer in answers.values()))
        self._console.print(table, soft_wrap=False)


class Plain:
    """Lines in, answers out; what is no answer goes to standard error, and an error ends it all."""

    def __init__(self, lines: TextIO, out: TextIO) -> None:
        self._lines, self._out = lines, out

    def read(self) -> str | None:
        lines: list[str] = []
        for line in self._lines:
            text = line.removesuffix("\n")
            if not text.endswith("\\"):
                return "\n".join([*lines, text])
            lines.append(text.removesuffix("\\"))
        return "\n".join(lines) if lines else None

    def notice(self, text: str) -> None:
        print(printable(text), file=sys.stderr)

    def error(self, error: InputError) -> None:
        raise error

    def answer(self, name: str, run: Run) -> None:
        answer = run(self._write, lambda: False)
        print(file=self._out, flush=True)
        note = _note(answer, False)
        if note:
            self.notice(note)

    def side_by_side(self, run: Callable[[], dict[str, Answer]]) -> None:
        for name, answer in run().items():
            text = answer.text.strip("\n")
            self._write(f"{name}> {text}\n")

    def _write(self, text: str) -> None:
        write_piece(text, self._out)


def _note(answer: Answer, is_stopped: bool) -> str | None:
    """What the user should know of how an answer ended."""
    if is_stopped:
        return "stopped"
    if answer.finish_reason == "length":
        return f"cut after {len(answer.tokens)} tokens, max_new_tokens; /set max_new_tokens N allows more"
    return "cut by max_time" if answer.finish_reason == "time" else None


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed while an answer comes waits for the next line, and does not show amid the answer."""
    if not sys.stdin.isatty() or find_spec("termios") is None:  # Windows has none
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is asked about instead of raised; the second one is raised."""
    pressed: list[bool] = []

    def handler(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _history(notice: Callable[[str], None]) -> History:
    """What was typed before, kept for this user alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi3_jax"
    file = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        notice(f"{file} cannot be written ({error.strerror}); what you type is not remembered for the next time")
        return InMemoryHistory()
    return FileHistory(str(file))


def _keys() -> KeyBindings:
    """Enter sends, unless a backslash stands before the cursor; Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # what the terminal made of it while an answer came
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Commands(Completer):
    """Commands, and after some of them what may follow."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:
        text = document.text_before_cursor
        command, blank, word = text.partition(" ")
        if not command.startswith("/") or " " in word:
            return
        following = {"/adapter": (*self._session.adapters, NONE), "/set": SETTINGS}
        choices = following.get(command, ()) if blank else tuple(COMMANDS)
        begun = word if blank else command
        for choice in choices:
            if choice.startswith(begun):
                yield Completion(choice, start_position=-len(begun), display_meta=COMMANDS.get(choice, ("",))[0])
