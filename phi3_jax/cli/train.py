"""`phi3-jax train`: a YAML file, values on the command line over it, and the run."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from phi3_jax.config.names import nearest
from phi3_jax.config.parse import add_sections, field_names, read_yaml
from phi3_jax.config.run import parse_run_config
from phi3_jax.config.sections import SECTIONS
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import printable

USAGE = "phi3-jax train [--config FILE] [--section.key value …]"
DESCRIPTION = """Fine-tune a model on chats. Every key of a configuration file can be given, or given anew, on the
command line. The names of transformers' TrainingArguments, TRL's SFTConfig and PEFT's LoraConfig are understood."""


def run(argv: Sequence[str]) -> None:
    if "-h" in argv or "--help" in argv:
        _help_parser().print_help()
        return
    raw, print_config = read_arguments(argv)
    config, notices = parse_run_config(raw)
    for notice in notices:
        print(printable(notice), file=sys.stderr if print_config else sys.stdout)
    if print_config:
        print(config.to_yaml(), end="")
        return
    config.data.require_train()

    from phi3_jax.parallel.distributed import initialize
    from phi3_jax.training.loop import train

    initialize()
    train(config)


def read_arguments(argv: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The sections that the arguments spell out, values still text, and whether to print them only.

    What stands on the command line wins over the files of `--config`, a later file over an earlier.
    """
    files: dict[str, Any] = {}
    given: dict[str, Any] = {}
    print_config = False
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not name.startswith("--"):
            raise InputError(f"unexpected argument {token!r}; options look like --training.learning_rate 1e-4")
        if name == "--print_config":
            print_config = True
            continue
        if name != "--config" and "." not in name:
            raise InputError(_unknown_option(name))
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise InputError(f"{name} needs a value after it")
        if name == "--config":
            _merge(files, read_yaml(value))
        else:
            _put(given, name[2:], value)
    _merge(files, given)
    return files, print_config


def _put(tree: dict[str, Any], dotted: str, value: str) -> None:
    *path, key = dotted.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise InputError(f"--{dotted} is given below --{'.'.join(path)}, which already has a value; leave one out")
    tree[key] = value


def _merge(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Puts the sections of `over` onto those of `under`, key by key."""
    for section, values in over.items():
        if isinstance(values, Mapping) and isinstance(under.get(section), Mapping):
            under[section] = {**under[section], **values}
        elif values is not None or section not in under:
            under[section] = values


def _unknown_option(name: str) -> str:
    options = {key: f"--{section}.{key}" for section, cls in SECTIONS.items() for key in field_names(cls)}
    options |= {"config": "--config", "print_config": "--print_config", "help": "--help"}
    return f"unknown option {name}; did you mean {options[nearest(name[2:], list(options))]}?"


def _help_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="phi3-jax train", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("--config", metavar="FILE", help="YAML file with these sections; may be given more than once.")
    parser.add_argument("--print_config", action="store_true", help="Print the whole configuration and stop.")
    add_sections(parser)
    return parser
