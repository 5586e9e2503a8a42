"""How much a command or a run says of what goes on: `--quiet`, `--verbose`, `logging.verbosity`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Verbosity = Literal["quiet", "normal", "verbose"]

# Of the whole process, since threads say things too.
_level: Verbosity = "normal"


def verbosity() -> Verbosity:
    """The level in force: quiet says results, warnings and errors alone; verbose every step and how long it took."""
    return _level


@contextmanager
def at_verbosity(level: Verbosity | None) -> Iterator[None]:
    """Says so much within; None as before.

    Example:
        >>> with at_verbosity("quiet"):
        ...     verbosity()
        'quiet'
    """
    global _level
    before = _level
    _level = _level if level is None else level
    try:
        yield
    finally:
        _level = before
