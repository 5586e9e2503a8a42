"""What the models of an evaluation are called."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_jax.system.errors import InputError

_NAME = re.compile(r"[\w.+-]+")

Named = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def name_models(named: Named) -> dict[str, str]:
    """Folders or hub ids, by name.

    Texts may be `NAME=PATH`; without a name it is the last part of the path, or the one before where that is only
    `adapter` or `model`, as training names what it writes.

    Raises:
        InputError: Two have one name.

    Example:
        >>> name_models(["orders=out/a", "out/demo/adapter"])
        {'orders': 'out/a', 'demo': 'out/demo/adapter'}
    """
    if isinstance(named, Mapping):
        return {str(name): str(path) for name, path in named.items()}
    models: dict[str, str] = {}
    for given in [named] if isinstance(named, str | Path) else named:
        text = str(given)
        name, equals, path = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or Path(text).exists():
            *_, above, last = Path("/", "base", text).parts
            name, path = re.sub(r"[^\w.+-]", "_", above if last in ("adapter", "model") else last), text
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
        if not _NAME.fullmatch(name) or set(name) == {"."}:
            raise InputError(f"{name!r} is no name for a model's file; give letters, digits and any of . _ + -")
