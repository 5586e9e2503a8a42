"""The options that spell out a run, `--config FILE` and `--section.key value`, for every command that takes them."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO, get_args, get_origin, get_type_hints

import jsonargparse

from phi3_jax.cli.parser import Parser
from phi3_jax.config.foreign import known_names
from phi3_jax.config.parse import Raw, merged
from phi3_jax.config.recipes import read_config
from phi3_jax.config.run import SECTIONS, RunConfig, parse_run_config
from phi3_jax.config.words import full_key, is_switch, near_key, placed
from phi3_jax.system.errors import InputError
from phi3_jax.system.telling import verbosity
from phi3_jax.system.text import printable


class RunParser(Parser, jsonargparse.ArgumentParser):
    """A parser of a command's own options and of those of a run, whose values stay text.

    What the text means is known once the names of other libraries are translated, see
    `phi3_jax.config.parse`. Keys that hold mappings take their entries one by one, too:
    `--data.columns.prompt question`.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        self._defaults: dict[str, object] = {}
        super().__init__(command, description, epilog)
        self.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="YAML file of a run, or a recipe's name; may be given again",
        )
        self._mappings: list[str] = []
        self._run_options = set()
        for option, mapping in _run_options():
            self._run_options.add(option)
            if mapping is None:
                self.add_argument(option, help=argparse.SUPPRESS)
            else:
                self.add_argument(option, type=mapping | str, help=argparse.SUPPRESS)
                self._mappings.append(f"{option}.")

    def parse(self, argv: Sequence[str]) -> jsonargparse.Namespace:
        options = self.parse_args(self._with_sections(argv), defaults=False)
        for name, default in self._defaults.items():
            if name not in options:
                options[name] = default
        return options

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action: argparse.Action = super().add_argument(*names, **settings)
        # jsonargparse takes 50 ms for the defaults of all keys of a run, which have none here.
        if "." not in action.dest and action.default != argparse.SUPPRESS:
            self._defaults[action.dest] = action.default
        return action

    def error(self, message: str, *_: object) -> NoReturn:
        example = ""
        if message.startswith("unrecognized"):
            word = message.split()[-1]
            is_rows = word.endswith((".jsonl", ".json", ".csv", ".parquet", ".arrow"))
            example = f"--data.train {word}" if is_rows else "--training.learning_rate 1e-4"
            example = f"; options look like {example}"
        super().error(message + example)

    def _with_sections(self, argv: Sequence[str]) -> list[str]:
        """The arguments with every option of a run as `--section.key=value`, under whatever name it was given."""
        tokens: list[str] = []
        left = list(argv)
        while left:
            token = left.pop(0)
            if token == "--":
                return [*tokens, token, *left]
            name, equals, value = token.partition("=")
            key, is_opposite = self._run_key(name) if name.startswith("--") else (None, False)
            if key is None:
                tokens.append(f"{self._own_name(name) or name}{equals}{value}")
                continue
            if not equals and is_switch(key, SECTIONS) and (not left or left[0].startswith("-")):
                equals, value = "=", "true"
            if is_opposite:
                value = _opposite(name, value if equals else left.pop(0))
                equals = "="
            tokens.append(f"--{key}{equals}{value}")
        return tokens

    def _run_key(self, name: str) -> tuple[str | None, bool]:
        """The `section.key` that an option means, None for one of the command's own; and whether the opposite."""
        own = self._own_name(name)
        if own is not None:
            return (own[2:] if own in self._run_options else None), False
        word = name[2:].replace("-", "_")
        if word == "use_peft":  # TRL's
            return "peft.full_finetuning", True
        if key := full_key(word, SECTIONS):
            return key, False
        key = full_key(word.removeprefix("no_"), SECTIONS) if word.startswith("no_") else None
        if key is not None and is_switch(key, SECTIONS):
            return key, True
        self._refuse(name)
        return None, False

    def _options(self) -> list[str]:
        keys = {f"--{section}.{name}" for section, cls in SECTIONS.items() for name in get_type_hints(cls)}
        return [option for option in super()._options() if option in keys or option not in self._run_options]

    def _refuse(self, name: str) -> None:
        """Raises `InputError` for a name that no option has; entries of a mapping have one."""
        if name.startswith(tuple(self._mappings)):
            return
        near = near_key(name.lstrip("-"), SECTIONS)
        if near is None:
            super()._refuse(name)
        raise InputError(f"unknown option {name}; did you mean --{near}?")


def _opposite(name: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise InputError(f"{name} is {value}, expected true or false")
    return str(value.lower() == "false").lower()


def _run_options() -> Iterator[tuple[str, type | None]]:
    """Every `--section.key`, under the names of other libraries too, and the type of mapping that it may hold."""
    for section, cls in SECTIONS.items():
        for name, hint in get_type_hints(cls).items():
            # What an entry may be is said where the whole run is read, in one line: here it may be anything.
            kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is dict]
            mapping: type = dict[str, str | None] if dict[str, str] in kinds else dict[str, object]
            yield f"--{section}.{name}", mapping if kinds else None
    for section in SECTIONS:
        for name in known_names(section):
            yield f"--{section}.{name}", dict[str, object] if name.endswith(("_config", "_kwargs")) else None


def read_run(options: jsonargparse.Namespace) -> Raw:
    """The sections that the options spell out, values still text.

    What stands on the command line wins over the files of `--config`, a later file over an earlier.
    """
    given: dict[str, dict[str, object]] = {}
    for section in SECTIONS:
        if section in options:
            given[section] = options[section].as_dict()
    if options.verbose or options.quiet:
        given.setdefault("logging", {})["verbosity"] = "verbose" if options.verbose else "quiet"
    return merged(*map(_read_config, options.config), given)


def _read_config(name: str) -> Raw:
    """A file of --config, or the recipe of that name; which of them is told where it may be taken for the other."""
    raw, line = read_config(name)
    if line is not None and verbosity() != "quiet":
        print(printable(line), file=sys.stderr)
    return dict(placed(raw, SECTIONS))


def make_run(raw: Raw, notices_to: TextIO | None = None) -> RunConfig:
    """The run; what of other libraries' names was ignored is told on standard error, or as `notices_to` says."""
    run, notices = parse_run_config(raw)
    for notice in notices:
        print(printable(notice), file=notices_to or sys.stderr)
    return run
