"""What the lines that begin with a slash do."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import yaml

from phi3_jax.chat.session import SETTINGS, Session
from phi3_jax.config.names import BASE, did_you_mean
from phi3_jax.generation.text import Answer
from phi3_jax.peft.names import named
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import parse_yaml


class Screen(Protocol):
    """Where a conversation is shown."""

    def read(self) -> str | None:
        """The user's next line, None at the end; it may hold line breaks."""

    def notice(self, text: str) -> None:
        """Shows what is no answer."""

    def error(self, error: InputError) -> None:
        """Shows what went wrong, or raises it where nobody watches."""

    def answer(self, name: str, run: Callable[[Callable[[str], None], Callable[[], bool]], Answer]) -> None:
        """Shows an answer while `run(write, is_stopped)` makes it; `name`, of who answers."""

    def side_by_side(self, run: Callable[[], dict[str, Answer]]) -> None:
        """Shows answers to the same message once `run` has made them."""


def converse(session: Session, screen: Screen) -> None:
    """Reads lines and answers them until the end, /quit or /exit."""
    while (line := screen.read()) is not None:
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not _command(line, session, screen):
                    return
            else:
                text = line.removeprefix("/") if line.startswith("//") else line
                screen.answer(session.adapter or BASE, partial(session.say, text))
        except InputError as error:
            screen.error(error)


def _command(line: str, session: Session, screen: Screen) -> bool:
    """Does what the line says; False to leave."""
    parts = line.split(maxsplit=1)
    name, argument = parts[0], parts[1] if len(parts) > 1 else ""
    name = "/quit" if name == "/exit" else name
    if name not in COMMANDS:
        raise InputError(
            f"unknown command {name}{did_you_mean(name, COMMANDS) or ';'} /help lists them; a message that begins with "
            "/ is written with //"
        )
    _, run = COMMANDS[name]
    if run is None:
        return False
    run(argument, session, screen)
    return True


def _adapter(argument: str, session: Session, screen: Screen) -> None:
    if "=" in argument:
        session.load(*named(argument))
    elif argument:
        session.switch(argument)
    else:
        for name in (BASE, *session.adapters):
            screen.notice(f"{'*' if name == (session.adapter or BASE) else ' '} {name}")
        return
    screen.notice(f"{session.adapter or BASE} answers now")


def _compare(argument: str, session: Session, screen: Screen) -> None:
    screen.side_by_side(lambda: session.compare(argument or None))


def _system(argument: str, session: Session, screen: Screen) -> None:
    session.set_system(argument)
    screen.notice("the system message is set" if argument else "there is no system message now")


def _retry(argument: str, session: Session, screen: Screen) -> None:
    screen.answer(session.adapter or BASE, session.retry)


def _set(argument: str, session: Session, screen: Screen) -> None:
    name, _, value = argument.partition(" ")
    if not name:
        for known in SETTINGS:
            screen.notice(f"{known} {_shown(getattr(session.settings, known))}")
        return
    if not value.strip():
        raise InputError(f"/set {name} has no value; give one, such as /set temperature 0.7")
    sampled = session.settings.do_sample
    try:
        read = parse_yaml(value)
    except ValueError as error:
        raise InputError(f"/set {name}: {value} is no value; quote a text that has brackets or colons") from error
    session.set(name, read)
    also = ", do_sample true" if session.settings.do_sample and not sampled and name != "do_sample" else ""
    screen.notice(f"{name} {_shown(getattr(session.settings, name))}{also}")


def _shown(value: object) -> str:
    """A value as /set takes it."""
    listed = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(listed, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()


def _reset(argument: str, session: Session, screen: Screen) -> None:
    session.reset()
    screen.notice("forgotten")


def _save(argument: str, session: Session, screen: Screen) -> None:
    if not argument:
        raise InputError("/save needs a file's name, such as /save chats.jsonl")
    screen.notice(session.save(Path(argument).expanduser()))


def _help(argument: str, session: Session, screen: Screen) -> None:
    for name, (text, _) in COMMANDS.items():
        screen.notice(f"{name:<9} {text}")


# What each does, and by which function; /quit needs none.
COMMANDS: dict[str, tuple[str, Callable[[str, Session, Screen], None] | None]] = {
    "/adapter": (
        "list the adapters; /adapter NAME switches, /adapter none is the base, /adapter NAME=PATH loads",
        _adapter,
    ),
    "/compare": ("answers of base and adapter to a TEXT, or to the last message, side by side", _compare),
    "/system": ("set the system message to TEXT, or remove it", _system),
    "/retry": ("answer the last message again", _retry),
    "/set": ("list the settings; /set NAME VALUE changes one, such as /set temperature 0.7", _set),
    "/reset": ("forget what was said", _reset),
    "/save": ("write the conversation to FILE: .jsonl for training (a line is added), .json or .md", _save),
    "/help": ("this list", _help),
    "/quit": ("leave; so do /exit and Ctrl-D", None),
}
