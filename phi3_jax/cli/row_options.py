"""The options that say how rows are read, for commands that take them one by one and no section `data`."""

import argparse
from dataclasses import replace
from typing import get_args

from phi3_jax.config.parse import columns_of_text
from phi3_jax.config.sections import DataSection
from phi3_jax.system.errors import InputError

_HELP = {
    "template": "none takes prompt and completion as they are where they are strings (default: auto)",
    "final_eos": "count the end token that a template writes behind the last turn, too",
    "literal_roles": "whose texts hold no special tokens, [] for nobody's (default: user,tool)",
    "ignore_keys": "columns, and keys of turns, to pass over that would be refused otherwise",
    "skip_empty": "leave out rows with nothing to measure",
    "skip_invalid": "leave out rows with any fault",
}


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each of these keys of `DataSection`."""
    fields = DataSection.__dataclass_fields__
    for key, help_text in _HELP.items():
        option, kind = f"--{key.replace('_', '-')}", fields[key].type
        if kind is bool:
            parser.add_argument(option, action="store_true", help=help_text)
        elif choices := get_args(kind) if key == "template" else ():
            parser.add_argument(option, choices=choices, default="auto", help=help_text)
        else:
            kind_of = roles if key == "literal_roles" else names
            parser.add_argument(option, type=kind_of, metavar="NAME,...", help=help_text)


def with_row_options(data: DataSection, arguments: argparse.Namespace) -> DataSection:
    """The section with what the options say in place of its own."""
    given = {key: getattr(arguments, key) for key in _HELP}
    return replace(data, **{key: value for key, value in given.items() if value is not None})


def names(text: str) -> list[str]:
    """Names with commas between, in brackets or without.

    Example:
        >>> names("name, id"), names("[name]"), names("[]")
        (['name', 'id'], ['name'], [])
    """
    inner = text.strip().removeprefix("[").removesuffix("]")
    return [name.strip() for name in inner.split(",") if name.strip()]


def roles(text: str) -> list[str]:
    """The same for roles. Raises argparse's error for others."""
    found = names(text)
    (kind,) = get_args(DataSection.__dataclass_fields__["literal_roles"].type)
    if unknown := set(found) - set(get_args(kind)):
        raise argparse.ArgumentTypeError(
            f"{sorted(unknown)[0]} is no role; expected some of {', '.join(get_args(kind))}"
        )
    return found


def columns(text: str) -> dict[str, str]:
    """Which column plays which part. Raises argparse's error for what is not of that form.

    Example:
        >>> columns("prompt=question,completion=answer")
        {'prompt': 'question', 'completion': 'answer'}
    """
    try:
        return columns_of_text(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
