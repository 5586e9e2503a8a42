"""What leans on the insides of other libraries, each with the reason; a test of each fails when the inside changes."""

import argparse
import json
import struct
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class TokenizersStep(Protocol):
    """A step of a tokenizer of the tokenizers library: a normalizer, a pre-tokenizer, a decoder."""

    def __getstate__(self) -> bytes: ...


def step_state(step: TokenizersStep | None) -> object:
    """What a step of a tokenizer consists of, as tokenizer.json has it; None where there is no step.

    The library gives it out as JSON of the whole tokenizer alone, vocabulary and all, which takes a tenth of a
    second; what a step pickles itself as is the same JSON.
    """
    return None if step is None else json.loads(step.__getstate__())


class _Buffer(Protocol):
    def to_pybytes(self) -> bytes: ...


class ArrowMessage(Protocol):
    """`pyarrow.ipc.Message`."""

    @property
    def type(self) -> str: ...

    @property
    def metadata(self) -> _Buffer: ...


def is_compressed(message: ArrowMessage) -> bool:
    """Whether an Arrow message holds compressed arrays.

    They are made as long as they say when pyarrow reads them, before anything can be checked, and pyarrow has no
    limit for that and no word of the compression: only the message's metadata, a FlatBuffer, says it. What is
    read here is laid down in Arrow's format/Message.fbs: the third field of a message is its header, of a
    dictionary's header the second its record batch, of a record batch the fourth its compression.
    """
    data = message.metadata.to_pybytes()

    def number(kind: str, place: int) -> int:
        return int(struct.unpack_from(kind, data, place)[0])

    def field(table: int, index: int) -> int | None:
        """Where a table's field is; None where it has its default."""
        names = table - number("<i", table)
        offset = number("<H", names + 4 + 2 * index) if 4 + 2 * index < number("<H", names) else 0
        return table + offset if offset else None

    def inner(place: int | None) -> int:
        assert place is not None
        return place + number("<I", place)

    header = field(inner(0), 2)
    if message.type == "dictionary":
        header = field(inner(header), 1)
    elif message.type != "record batch":
        return False
    return field(inner(header), 3) is not None


class _Scored(Protocol):
    score: float


class SetScorer(Protocol):
    """sacrebleu's `BLEU` or `CHRF`."""

    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[list[int]]: ...

    def _compute_score_from_stats(self, stats: list[int]) -> _Scored: ...


def ngram_counts(scorer: SetScorer, answers: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """The n-gram counts of each answer, whose sums over a set give the set's score.

    sacrebleu resamples them for its own significance tests, but gives them out for BLEU's sentences alone, not for
    chrF's.
    """
    return scorer._extract_corpus_statistics(answers, [references])


def score_of_counts(scorer: SetScorer, sums: list[int]) -> float:
    """The score of a set of answers, of the sums of its `ngram_counts`."""
    return scorer._compute_score_from_stats(sums).score


class HarnessCommand(Protocol):
    """lm-evaluation-harness's command."""

    def execute(self, args: argparse.Namespace) -> None: ...


def harness_command(arguments: Sequence[str]) -> tuple[HarnessCommand, argparse.Namespace]:
    """lm-evaluation-harness's command, and what its parser makes of the arguments.

    The harness has a function for the whole command only, which takes `sys.argv` and can be given no model; the
    command's class parses first and then executes.

    Raises:
        SystemExit: The arguments are wrong, as the parser has said on standard error.
    """
    from lm_eval._cli import HarnessCLI

    command = HarnessCLI()
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        return command, command.parse_args()
    finally:
        sys.argv = before


class EventFile:
    """A new file of TensorBoard's events, each in the file by the time `flush` returns.

    tensorboardX's documented writer leaves the writing to a thread, which a full disk ends without a word to anybody;
    what it writes with does not.

    Args:
        path: The file, whose name has to contain "tfevents".

    Raises:
        OSError: The file cannot be written, as in all that follows.
    """

    def __init__(self, path: Path) -> None:
        # tensorboardX brings PyTorch along where that is installed: seconds
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._session, self._scalar = Event, SessionLog, scalar
        self._file = RecordWriter(str(path))
        self._add(file_version="brain.Event:2")

    def _add(self, **fields: object) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def restart(self, step: int) -> None:
        """Has what earlier files of the folder say of this step and all later ones left out."""
        self._add(step=step, session_log=self._session(status=self._session.START))

    def scalar(self, step: int, name: str, value: float) -> None:
        """A point of a curve."""
        self._add(step=step, summary=self._scalar(name, value))

    def flush(self) -> None:
        """Has what was added in the file."""
        self._file.flush()

    def close(self) -> None:
        """The end of the file."""
        self._file.close()


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a parser's options, such as `--help`, in the order in which they were added.

    argparse tells them nowhere but in its help text, and its own `suggest_on_error` (Python 3.14) is for
    choices and subcommands alone.
    """
    return list(parser._option_string_actions)


class Option(NamedTuple):
    """An option of a parser.

    Attributes:
        name: Its long name, `--output`.
        help: Its help text; empty where the help leaves it out.
        values: Those that it can have, where they are listed.
        takes_value: Whether one follows it.
    """

    name: str
    help: str
    values: tuple[str, ...]
    takes_value: bool


def options_of(parser: argparse.ArgumentParser) -> list[Option]:
    """The options of a parser with a long name."""
    found = []
    for action in parser._actions:
        name = next((name for name in action.option_strings if name.startswith("--")), None)
        if name is not None:
            text = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
            values = tuple(map(str, action.choices or ()))
            found.append(Option(name, text, values, takes_value=action.nargs != 0))
    return found


def positionals(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The arguments of a parser that have no option's name: where each is stored, and what the help calls it."""
    return {action.dest: str(action.metavar or action.dest) for action in parser._get_positional_actions()}


def hide_options(parser: argparse.ArgumentParser, names: Container[str]) -> None:
    """Leaves the options whose value is stored under one of `names` out of the help.

    `jsonargparse.ArgumentParser.add_class_arguments` adds `--model CONFIG` before the options of a
    section `model`, and has no argument that leaves it out.
    """
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def adds_to_some_of_a_scan() -> bool:
    """Whether a gradient may be added to references (`jax.vjp`'s `with_refs`) where a scan runs over parameters
    that have them and over arrays that are made of parameters.

    Before 0.12 JAX gives such a reference the gradient of another array, without an error.
    """
    import jax

    version: tuple[int, ...] = jax.__version_info__
    return version >= (0, 12)
