"""From nested dictionaries to the sections of a run: names, types, and errors of one line.

jsonargparse knows the types and writes the help from the sections' docstrings. A section is a dataclass,
and which sections there are, the caller says.
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
from phi3_jax.config.words import near_key, placed
from phi3_jax.system import reading
from phi3_jax.system.compat import hide_options
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path

Classes = Mapping[str, type]
Raw = dict[str, object]  # a run's sections, with nothing checked
_AXES = ("data", "fsdp", "tensor", "context")
# What a key stands for in place of, where that is of a layer below.
_INSTEAD: dict[tuple[str, str], tuple[str, ...]] = {
    ("data", "eval"): ("eval_fraction",),
    ("parallel", "axes"): _AXES,
    **{("parallel", axis): ("axes",) for axis in _AXES},
}


def add_sections(parser: ArgumentParser, classes: Classes) -> None:
    """Adds `--section.key` for every key of a run, typed and with its help text."""
    for name, section in classes.items():
        parser.add_class_arguments(section, name)
    hide_options(parser, classes)  # there is one --config


def parse_sections(raw: Mapping[str, object], classes: Classes) -> tuple[dict[str, Any], list[str]]:
    """Makes a run's sections of nested values, typed or the text of a command line.

    Args:
        raw: The values of each section; names of which only one section can be meant may stand beside them.
        classes: The dataclass of each section.

    Returns:
        The sections by name, and lines to print about names of other libraries that were ignored.

    Raises:
        InputError: For the first thing that is wrong.
    """
    sections: dict[str, Mapping[str, object]] = {}
    for name, values in placed(raw, classes).items():
        values = {} if values is None else values  # an empty section in YAML
        if not isinstance(values, Mapping):
            raise InputError(f"{name} is {values!r}, expected a section of keys and values")
        sections[name] = values
    translated, notices = foreign.translate(sections)
    for section, values in translated.items():
        _check_keys(section, values, classes)
    translated = {section: _from_text(section, values, classes[section]) for section, values in translated.items()}
    if not translated.get("model", {}).get("name_or_path"):
        raise InputError("model.name_or_path is not given; give a checkpoint folder or a hub id")
    try:
        parsed = _parser(tuple(classes.items())).parse_object(translated, defaults=True).as_dict()
    except argparse.ArgumentError as error:
        raise InputError(_type_error(str(error), translated, classes)) from error
    _check_nulls(parsed, classes)
    return {name: cls(**parsed[name]) for name, cls in classes.items()}, notices


def read_yaml(path: str | Path) -> Raw:
    """A configuration file's contents; `InputError` where it cannot be read or is no mapping."""
    raw = reading.read_yaml(local_path(path), "give a YAML file of a run")
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected sections such as model, data and training")
    return raw


def merged(*layers: Mapping[str, object]) -> Raw:
    """The sections of all layers, a later one's keys over an earlier one's.

    Rows of their own to evaluate on stand for a share of the training rows, too, that an earlier layer holds out; axes
    of the mesh for what chooses them, and the other way round.

    Example:
        >>> merged({"data": {"train": "a", "eval_fraction": 0.1}}, {"data": {"eval": "b"}})
        {'data': {'train': 'a', 'eval': 'b'}}
    """
    raw: Raw = {}
    for layer in layers:
        for section, values in layer.items():
            below = raw.get(section)
            if isinstance(values, Mapping) and isinstance(below, Mapping):
                said = [key for key, value in values.items() if value not in (None, "null", "given")]
                gone = {other for key in said for other in _INSTEAD.get((section, key), ())}
                raw[section] = {**{key: value for key, value in below.items() if key not in gone}, **values}
            elif values is not None or section not in raw:
                raw[section] = values
    return raw


def columns_of_text(text: str) -> dict[str, str]:
    """Which column plays which part, of text with commas.

    Raises:
        InputError: It is not of that form.

    Example:
        >>> columns_of_text("prompt=question, completion=answer")
        {'prompt': 'question', 'completion': 'answer'}
    """
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {part.strip(): column.strip() for part, _, column in pairs}
    if not all((*found, *found.values())):
        raise InputError(f"{text} is not of the form prompt=question,completion=answer")
    return found


@cache
def _parser(classes: tuple[tuple[str, type], ...]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_sections(parser, dict(classes))
    return parser


def _check_keys(section: str, values: Mapping[str, object], classes: Classes) -> None:
    known = [field.name for field in fields(classes[section])]
    for key in values:
        if key not in known:
            near = near_key(f"{section}.{key}", classes)
            help = f"`phi3-jax train --help {section}` lists its keys"
            raise InputError(f"unknown key {section}.{key}; " + (f"did you mean {near}?" if near else help))


def _from_text(name: str, values: Mapping[str, object], section: type) -> dict[str, object]:
    """The values of a section, with the lists and mappings of names that text with commas stands for."""
    hints = get_type_hints(section)
    return {key: _value_of_text(f"{name}.{key}", value, hints[key]) for key, value in values.items()}


def _value_of_text(key: str, value: object, hint: object) -> object:
    if not isinstance(value, str):
        return value
    kinds = get_args(hint)
    # No module's name has a comma: an expression of names with commas could match nothing.
    if get_origin(hint) is list or (str in kinds and tuple[str, ...] in kinds and "," in value):
        return _names(value)
    if dict[str, str] in kinds and str not in kinds and "=" in value and not value.lstrip().startswith("{"):
        try:
            return columns_of_text(value)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
    return value


def _names(value: str) -> object:
    text = value.strip()
    is_names = text != "null" and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", text)
    return re.split(r"\s*,\s*", text) if is_names else value


def _check_nulls(parsed: Mapping[str, Mapping[str, object]], classes: Classes) -> None:
    # jsonargparse lets null pass for every type.
    for section, cls in classes.items():
        for key, hint in get_type_hints(cls).items():
            if parsed[section][key] is None and type(None) not in get_args(hint):
                raise InputError(f"{section}.{key} is null, expected {_describe(hint)}; leave it out")


def _type_error(message: str, values: Mapping[str, Mapping[str, object]], classes: Classes) -> str:
    found = re.search(r'"(\w+)\.(\w+)', message)
    if not found or found[2] not in values.get(found[1], {}):
        return message
    hint = get_type_hints(classes[found[1]])[found[2]]
    return f"{found[1]}.{found[2]} is {values[found[1]][found[2]]!r}, expected {_describe(hint)}"


def _describe(hint: object) -> str:
    """A type in words."""
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin in (tuple, list):
        if get_origin(arguments[0]) is Literal:
            return f"a list of {_describe(arguments[0]).removeprefix('one of ')}"
        return "a list of whole numbers" if arguments[0] is int else "a list of names"
    if origin is dict:
        return "a mapping of names"
    words: dict[object, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return words.get(hint, str(hint))
