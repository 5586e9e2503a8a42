"""The commands that pages show, and what a page says of how they are tested."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_jax.cli.main import COMMANDS
from phi3_jax.cli.run_options import RunParser, read_run
from phi3_jax.config.parse import merged
from phi3_jax.config.recipes import recipe_names
from phi3_jax.config.run import parse_run_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>run|needs: [^>]+) -->\n\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_PROGRAMS = ("phi3-jax", "pip", "python", "make")
_ELISION = "…"


@dataclass(frozen=True)
class Block:
    """A block of commands on a page.

    Attributes:
        mark: `run`, or what the commands need; None where the page does not say.
        text: As it stands there.
    """

    mark: str | None
    text: str

    @property
    def script(self) -> str:
        """What is typed; where a block shows what comes of it, too, the lines after the prompt."""
        lines = self.text.replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return "\n".join(typed or lines)

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a program of ours, or that runs one."""
        return [words for line in self.script.splitlines() for words in split(line) if words and words[0] in _PROGRAMS]


def blocks(page: Path) -> list[Block]:
    """Those of a page that hold commands; blocks of other languages are none."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["mark"], match["text"]) for match in _BLOCK.finditer(text) if match["kind"] in ("", "sh", "bash")
    ]
    return [block for block in found if block.commands]


def inline(page: Path) -> Iterator[list[str]]:
    """The words of commands within a page's sentences."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?:phi3-jax|pip|make) [^`]+)`", text):
        yield from split(code)


def split(line: str) -> list[list[str]]:
    """The words of the commands of a shell's line; comments, elisions, variables before them and what feeds them go."""
    try:
        words = shlex.split(line.removeprefix("$ "), comments=True)
    except ValueError:  # no command
        return []
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|"):
            commands.append([])
        elif word in (">", "<"):
            commands[-1].append(word)
        elif word != _ELISION and not (not commands[-1] and re.fullmatch(r"[A-Z_]+=\S*", word)):
            commands[-1].append(word.removeprefix(".venv/bin/") if not commands[-1] else word)
    return [_without_redirection(words) for words in commands]


def _without_redirection(words: list[str]) -> list[str]:
    return words[: next((i for i, word in enumerate(words) if word in (">", "<")), len(words))]


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def parser_of(words: list[str]) -> tuple[Any, list[str]]:
    """The parser of a command of ours, and the words that it is to parse."""
    name, *rest = words
    assert name in COMMANDS, words
    module = name.replace("-", "_")
    if name == "benchmark":
        part, *rest = rest
        module = f"benchmark_{part}"
    return importlib.import_module(f"phi3_jax.cli.{module}").make_parser(), rest


def check(words: list[str]) -> None:
    """Raises where a command cannot be parsed, or names what is not there."""
    program, *rest = words
    if program == "phi3-jax":
        parser, arguments = parser_of(rest)
        if rest[0] == "lm-eval":  # which hands what it does not know to the harness
            parser.parse_known_args(arguments)
            return
        options = parser.parse(arguments)
        if isinstance(parser, RunParser) and all(map(_is_there, options.config)):
            raw = read_run(options)
            parse_run_config(merged({"model": {"name_or_path": "any"}}, raw))
    elif program == "make":
        assert set(rest) <= set(TARGETS), words
    elif program == "pip":
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= EXTRAS.keys(), words
    elif rest and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), words


def _is_there(config: str) -> bool:
    return config.removesuffix(".yaml") in recipe_names() or Path(config).is_file()
