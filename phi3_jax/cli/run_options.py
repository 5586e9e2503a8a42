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
        for option, mapping in _run_options():
            if mapping is None:
                self.add_argument(option, help=argparse.SUPPRESS)
            else:
                self.add_argument(option, type=mapping | str, help=argparse.SUPPRESS)
                self._mappings.append(f"{option}.")

    def parse(self, argv: Sequence[str]) -> jsonargparse.Namespace:
        options = self.parse_args(self.spelt(argv, unknown=self._refuse), defaults=False)
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
        example = "; options look like --training.learning_rate 1e-4" if message.startswith("unrecognized") else ""
        super().error(message + example)

    def _refuse(self, name: str) -> None:
        if not name.startswith(tuple(self._mappings)):
            super()._refuse(name)


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
    given: Raw = {}
    for section in SECTIONS:
        if section in options:
            given[section] = options[section].as_dict()
    return merged(*map(_read_config, options.config), given)


def _read_config(name: str) -> Raw:
    """A file of --config, or the recipe of that name; which of them is told where it may be taken for the other."""
    raw, line = read_config(name)
    if line is not None:
        print(printable(line), file=sys.stderr)
    return raw


def make_run(raw: Raw, notices_to: TextIO | None = None) -> RunConfig:
    """The run; what of other libraries' names was ignored is told on standard error, or as `notices_to` says."""
    run, notices = parse_run_config(raw)
    for notice in notices:
        print(printable(notice), file=notices_to or sys.stderr)
    return run
