"""`phi3-jax generate`: answers to prompts."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from phi3_jax.cli.generation import (
    AS_CHECKPOINT,
    Loaded,
    add_adapters_argument,
    add_generation_arguments,
    generation_settings,
    load,
)
from phi3_jax.cli.parser import Parser, add_base_arguments, positive
from phi3_jax.config.generation import GenerationConfig
from phi3_jax.config.names import BASE
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing
from phi3_jax.system.telling import taking, taking_first
from phi3_jax.system.text import json_line, write_piece

if TYPE_CHECKING:
    from phi3_jax.cli.prompts import Prompt
    from phi3_jax.generation.text import Answer
    from phi3_jax.lora import Lora

    Adapters = Mapping[str, Lora | None]

MAX_NEW_TOKENS = 128


def run(argv: Sequence[str]) -> None:
    """Runs `phi3-jax generate`."""
    arguments = make_parser().parse(argv)
    _check(arguments)

    from phi3_jax.cli.prompts import prompt_tokens, read_prompts, text_prompt
    from phi3_jax.data.chat import ChatTokenizer
    from phi3_jax.generation.text import check_prompt

    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts)
    else:
        prompts = [text_prompt(text, f"--prompt {number}") for number, text in enumerate(arguments.prompt, 1)]
    loaded = load(arguments)
    tokenizer = loaded.tokenizer
    if not arguments.raw and tokenizer.chat_template is None:
        raise InputError(f"{loaded.checkpoint.name}: its tokenizer has no chat template; give --raw")
    settings = generation_settings(arguments, loaded.config, tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    chat = None if arguments.raw else ChatTokenizer(tokenizer)
    tokens = [prompt_tokens(prompt, tokenizer, chat, arguments.system) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        check_prompt(ids, prompt.where, loaded.config, settings, tokenizer)
    adapters = loaded.adapters or {BASE: None}
    with _output(arguments.output) as out:
        write = _Writer(out, arguments, prompts, list(adapters))
        if arguments.stream:
            _stream(loaded, tokens, adapters, settings, write)
        else:
            _answer(loaded, tokens, adapters, settings, arguments.batch_size, write)


def make_parser() -> Parser:
    """The options of `phi3-jax generate`."""
    parser = Parser("generate", "Answer prompts.")
    add_base_arguments(parser)
    add_adapters_argument(
        parser,
        "folder of an adapter, run or checkpoint, or hub id (PEFT); given again, or with `none`, each answers",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="what the user says; may be given again")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="one a line, or JSON lines with prompt or messages (.jsonl); -: standard input",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for prompts that bring none")
    parser.add_argument("--raw", action="store_true", help="the prompts as they are, without the chat template")
    add_generation_arguments(parser, AS_CHECKPOINT.format(MAX_NEW_TOKENS))
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="answers side by side (default: 8)")
    parser.add_argument("--stream", action="store_true", help="show the answers one by one, while they come")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for every answer")
    parser.add_argument("--logprobs", action="store_true", help="with --json: log-probabilities of the tokens")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to standard output")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise InputError(f"{arguments.output}: there is no such folder; make it, or choose another file")
    if arguments.raw and arguments.system:
        raise InputError("--system has no place with --raw, which writes no template; say it in the prompt")
    if arguments.logprobs and not arguments.json:
        raise InputError("--logprobs are printed with --json alone; add it")
    if arguments.stream and (arguments.json or arguments.output):
        raise InputError("--stream shows answers while they come; leave out --json and --output")
    if arguments.stream and (arguments.num_return_sequences or 1) > 1:
        raise InputError("--stream shows one answer to a prompt; leave out --num-return-sequences")


@contextmanager
def _output(file: str | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    path = Path(file)
    was_there = path.exists()
    try:
        with storing(path), path.open("w", encoding="utf-8") as out:
            yield out
    except BaseException:
        if not was_there and path.exists() and not path.stat().st_size:
            path.unlink()
        raise


def _answer(
    loaded: Loaded,
    tokens: list[list[int]],
    adapters: "Adapters",
    settings: GenerationConfig,
    batch_size: int,
    write: "_Writer",
) -> None:
    from phi3_jax.generation.text import answer_with_each

    found: dict[tuple[int, str], list["Answer"]] = {}
    left = [(index, name) for index in range(len(tokens)) for name in adapters]

    def write_next() -> None:
        key = left.pop(0)
        for answer in found.pop(key, []):
            write(*key, answer)

    try:
        answers = answer_with_each(
            loaded.model, loaded.tokenizer, tokens, adapters, settings=settings, batch_size=batch_size
        )
        for index, name, answer in taking_first("compiling, and the first answers", answers):
            found.setdefault((index, name), []).append(answer)
            # In the order of the prompts, as early as that allows.
            while left and len(found.get(left[0], [])) == settings.num_return_sequences:
                write_next()
    finally:
        while left:  # only where something went wrong
            write_next()


def _stream(
    loaded: Loaded, tokens: list[list[int]], adapters: "Adapters", settings: GenerationConfig, write: "_Writer"
) -> None:
    from phi3_jax.generation.stream import stream_answer
    from phi3_jax.generation.text import prompt_seeds

    seeds = prompt_seeds(settings, len(tokens))
    model = loaded.model
    with ExitStack() as waiting:
        waiting.enter_context(taking("compiling, and the first words"))

        def show(piece: str) -> None:
            waiting.close()
            write.piece(piece)

        for index, prompt in enumerate(tokens):
            for name, lora in adapters.items():
                write.heading(index, name)
                own = settings.with_(seed=(seeds[index],))
                stream_answer(model, loaded.tokenizer, prompt, show, lora=lora, settings=own)
                show("\n")


class _Writer:
    """Writes answers as text or JSON."""

    def __init__(
        self, out: TextIO, arguments: argparse.Namespace, prompts: Sequence["Prompt"], names: Sequence[str]
    ) -> None:
        self._out, self._prompts, self._names = out, prompts, names
        self._json, self._logprobs = arguments.json, arguments.logprobs
        self._has_adapters = bool(arguments.adapter)
        self._last: int | None = None

    def __call__(self, index: int, name: str, answer: "Answer") -> None:
        if not self._json:
            self.heading(index, name)
            self.piece(answer.text.strip("\n") + "\n")
            return
        row = dict(self._prompts[index].row)
        if self._has_adapters:
            row["adapter"] = name
        row |= {"answer": answer.text, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
        if self._logprobs:
            row["logprobs"] = answer.logprobs
        print(json_line(row), file=self._out, flush=True)

    def heading(self, index: int, name: str) -> None:
        """What is asked, where there are several prompts, and who answers, where there are several adapters."""
        if len(self._prompts) > 1 and index != self._last:
            self.piece(f"{'' if self._last is None else chr(10)}[{index + 1}] {self._prompts[index].title}\n")
        self._last = index
        if len(self._names) > 1:
            self.piece(f"{name}> ")

    def piece(self, text: str) -> None:
        write_piece(text, self._out)
