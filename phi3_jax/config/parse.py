"""From nested dictionaries to the sections of a run: names, types, and errors of one line.

jsonargparse knows the types and writes the help from the sections' docstrings.
"""

import argparse
import re
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from phi3_jax.config import foreign
from phi3_jax.config.names import nearest
from phi3_jax.config.sections import SECTIONS, PeftSection
from phi3_jax.system import reading
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path


def field_names(section: type) -> list[str]:
    """The keys of a section."""
    return [f.name for f in fields(section)]


def add_sections(parser: ArgumentParser) -> None:
    """Adds `--section.key` for every key of a run, typed and with its help text."""
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for action in parser._actions:
        if action.dest in SECTIONS:  # jsonargparse's own "--model CONFIG"; there is one --config
            action.help = argparse.SUPPRESS


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_sections(parser)
    return parser


def parse_sections(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Makes a run's sections of nested values, typed or the text of a command line.

    Returns them by name, with lines to print about names of other libraries that were ignored. Raises
    `InputError` for the first thing that is wrong.
    """
    sections: dict[str, Mapping[str, Any]] = {}
    for name, values in raw.items():
        if name not in SECTIONS:
            raise InputError(f"unknown section {name}; did you mean {nearest(str(name), list(SECTIONS))}?")
        values = {} if values is None else values  # an empty section in YAML
        if not isinstance(values, Mapping):
            raise InputError(f"{name} is {values!r}, expected a section of keys and values")
        sections[name] = values
    translated, notices = foreign.translate(sections)
    for section, values in translated.items():
        _check_keys(section, values)
    if not translated.get("model", {}).get("name_or_path"):
        raise InputError("model.name_or_path is not given; give a checkpoint folder or a hub id")
    parser = _parser()
    try:
        parsed = parser.parse_object(translated, defaults=True).as_dict()
    except argparse.ArgumentError as error:
        raise InputError(_type_error(str(error), parser, translated)) from error
    _check_nulls(parsed)
    return {name: cls(**parsed[name]) for name, cls in SECTIONS.items()}, notices


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file's contents; `InputError` where it cannot be read or is no mapping."""
    raw = reading.read_yaml(local_path(path), "give a YAML file of a run")
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected sections such as model, data and training")
    return raw


def _check_keys(section: str, values: Mapping[str, Any]) -> None:
    own = field_names(SECTIONS[section])
    for key in values:
        if key in own:
            continue
        elsewhere = [f"{other}.{key}" for other, cls in SECTIONS.items() if key in field_names(cls)]
        near = elsewhere[0] if elsewhere else f"{section}.{nearest(str(key), own + foreign.known_names(section))}"
        raise InputError(f"unknown key {section}.{key}; did you mean {near}?")


def _check_nulls(parsed: Mapping[str, Mapping[str, Any]]) -> None:
    # jsonargparse lets null pass for every type. LoraConfig looks at its own.
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls) if cls is not PeftSection else {}
        for key, value in parsed[section].items():
            if value is None and key in hints and type(None) not in get_args(hints[key]):
                raise InputError(f"{section}.{key} is null, expected {_describe(hints[key])}; leave it out")


def _type_error(message: str, parser: ArgumentParser, values: Mapping[str, Mapping[str, Any]]) -> str:
    found = re.search(r'"(\w+)\.(\w+)', message)
    if not found or found[2] not in values.get(found[1], {}):
        return _one_line(message)
    key = f"{found[1]}.{found[2]}"
    hints = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    return f"{key} is {values[found[1]][found[2]]!r}, expected {_describe(hints.get(key))}"


def _describe(hint: Any) -> str:
    """A type in words."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(a) for a in arguments)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if get_origin(hint) in (tuple, list):
        return "a list of whole numbers" if arguments[0] is int else "a list of names"
    if get_origin(hint) is dict:
        return "a mapping of names"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(hint, str(hint))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
