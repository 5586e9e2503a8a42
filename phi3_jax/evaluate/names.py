"""What the models of an evaluation are called."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_jax.peft.names import named
from phi3_jax.system.errors import InputError

_NAME = re.compile(r"[\w.+-]+")

Named = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def name_models(given: Named) -> dict[str, str]:
    """Folders or hub ids, by name: that of `NAME=PATH`, or the path's own (`peft.names.named`).

    Raises:
        InputError: Two have one name, or one has a name that no file can have.

    Example:
        >>> name_models(["orders=out/a", "out/demo/adapter"])
        {'orders': 'out/a', 'demo': 'out/demo/adapter'}
    """
    if isinstance(given, Mapping):
        return {str(name): str(path) for name, path in given.items()}
    models: dict[str, str] = {}
    for text in [given] if isinstance(given, str | Path) else given:
        name, path = named(str(text))
        _check_name(name, f" ({text})")
        if name in models:
            raise InputError(f"{models[name]} and {path} are both named {name}; give names, such as other={path}")
        models[name] = path
    return models


def check_names(names: Sequence[str]) -> None:
    """Looks at the names of all models.

    Raises:
        InputError: Two are the same, or one is no name for a file.
    """
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"two models are named {name}; give the adapter or checkpoint another name, NAME=PATH")
        _check_name(name)


def _check_name(name: str, given: str = "") -> None:
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise InputError(f"{name!r} is no name for a model's file{given}; give letters, digits and any of . _ + -")
