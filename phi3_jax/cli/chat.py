"""`phi3-jax chat`: a conversation in the terminal."""

import io
import sys
from collections.abc import Sequence

from phi3_jax.cli.generation import (
    AS_CHECKPOINT,
    add_adapters_argument,
    add_generation_arguments,
    generation_settings,
    load,
)
from phi3_jax.cli.parser import Parser, add_base_arguments, hub_of
from phi3_jax.config.names import BASE, NONE
from phi3_jax.system.errors import InputError

MAX_NEW_TOKENS = 512


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax chat`."""
    arguments = make_parser().parse(argv)
    if NONE in arguments.adapter:
        raise InputError("--adapter none has no meaning here: the base is always there; leave it out")
    loaded = load(arguments)
    settings = generation_settings(arguments, loaded.config, loaded.tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    hub = hub_of(arguments).at(None)

    from phi3_jax.chat.commands import Screen, converse
    from phi3_jax.chat.session import Session
    from phi3_jax.chat.terminal import Plain, Terminal
    from phi3_jax.lora import Lora
    from phi3_jax.peft.adapter import PeftAdapter

    def load_another(path: str) -> Lora:
        adapter = PeftAdapter.open(path, hub)
        loaded.checkpoint.check_tokenizer(adapter)
        return adapter.load(loaded.model, loaded.checkpoint)

    session = Session(
        loaded.model,
        loaded.tokenizer,
        settings,
        adapters={name: lora for name, lora in loaded.adapters.items() if lora is not None},
        load=load_another,
        system=arguments.system,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # told by the message that has them
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen: Screen = Terminal(session) if is_terminal else Plain(sys.stdin, sys.stdout)
    session.notice = screen.notice
    if is_terminal:
        names = ", ".join([BASE, *loaded.adapters])
        screen.notice(f"{loaded.checkpoint.name}: {names}. /help lists the commands, Ctrl-D leaves.")
    converse(session, screen)


def make_parser() -> Parser:
    """The options of `phi3-jax chat`."""
    parser = Parser("chat", "Talk to a model and its adapters. /help lists what can be done on the way.")
    add_base_arguments(parser)
    add_adapters_argument(
        parser, "folder of an adapter, run or checkpoint, or hub id (PEFT); may be given again, the first answers"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_generation_arguments(parser, AS_CHECKPOINT.format(MAX_NEW_TOKENS), without=("num_return_sequences",))
    return parser
