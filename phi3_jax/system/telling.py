"""What is said on standard error while something goes on: how much of it, and how far it is.

Of several processes the first alone speaks. JAX and rich are imported when something is said, since the command line's
help has neither.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

from phi3_jax.system.secrets import redact
from phi3_jax.system.text import printable

if TYPE_CHECKING:
    from rich.console import Console

Verbosity = Literal["quiet", "normal", "verbose"]
Item = TypeVar("Item")

SECONDS = 2.0  # what takes less is spoken of with --verbose alone
_EVERY = 0.1  # seconds; to tell the bar of each row would take a tenth of the time that the rows take

# Of the whole process, since threads say things too.
_level: Verbosity = "normal"
_first: Callable[[], str] | None = None
_lock = threading.RLock()


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
    global _level, _first
    before = _level
    _level = before if level is None else level
    try:
        yield
    finally:
        _level, _first = before, None


def tell_first(line: Callable[[], str] | None) -> None:
    """Has a line stand before whatever is told next, and be found out only then; None forgets it."""
    global _first
    _first = line


def tell(text: str) -> None:
    """One line on standard error."""
    with _lock:
        _print(_take_first())
        _print(text)


def is_speaker() -> bool:
    """Whether this process is the one of several that speaks."""
    if "jax" not in sys.modules:
        return True
    from phi3_jax.system.compat_jax import distributed_state

    return distributed_state().process_id == 0


@contextmanager
def taking(doing: str) -> Iterator[None]:
    """Says of a step that may take long that it has begun, once it has taken more than a moment, and how long it took.

    Args:
        doing: What, such as `loading the model`.

    Example:
        >>> with taking("adding up"):  # nothing is said, since it is done at once
        ...     _ = 1 + 1
    """
    with _lock:
        _print(_take_first())
    begun = time.monotonic()
    is_told = threading.Event()
    is_over = False

    def begin() -> None:
        with _lock:
            if not is_over:
                is_told.set()
                tell(f"{doing} ...")

    timer = threading.Timer(_patience(), begin)
    timer.daemon = True
    if _patience() > 0:
        timer.start()
    else:
        begin()
    try:
        yield
    finally:
        timer.cancel()
        with _lock:
            is_over = True
    if is_told.is_set():
        tell(f"{doing} took {time.monotonic() - begun:.1f} s")


def taking_first(doing: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items; the first of them is what `taking` speaks of, as of programs that are compiled when they first run.

    Example:
        >>> list(taking_first("answering", iter("ab")))
        ['a', 'b']
    """
    left = iter(items)
    with taking(doing):
        first = list(islice(left, 1))
    yield from first
    yield from left


@contextmanager
def watched(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far something is, once it has taken more than a moment: a bar in a terminal, elsewhere a line.

    Args:
        doing: What, in a word or two.
        total: How many rows it takes.

    Example:
        >>> with watched("rendering", 3) as advance:  # nothing is shown, since it is done at once
        ...     for _ in range(3):
        ...         advance(1)
    """
    shown = _Shown(doing, total)
    try:
        yield shown.advance
        shown.finish()
    finally:
        shown.stop()


class _Shown:
    def __init__(self, doing: str, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._doing, self._total, self._done = doing, total, 0
        self._begun = self._looked = time.monotonic()
        console = _console()
        self._is_watched, self._is_shown = console.is_terminal and not console.quiet, False
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, *times, console=console, disable=not self._is_watched, transient=True)
        self._task = self._bar.add_task(doing, total=total)
        if _level == "verbose":
            self._begin()

    def advance(self, rows: int) -> None:
        self._done += rows
        now = time.monotonic()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        if not self._is_shown and now - self._begun > _patience():
            self._begin()
        if self._is_watched:
            self._bar.update(self._task, completed=self._done)

    def _begin(self) -> None:
        self._is_shown = True
        if self._is_watched:
            with _lock:
                _print(_take_first())
            self._bar.start()
        else:
            tell(f"{self._doing} {self._total:,} rows ...")

    def finish(self) -> None:
        if self._is_shown:
            self.stop()
            tell(f"{self._doing} {self._done:,} rows took {time.monotonic() - self._begun:.1f} s")

    def stop(self) -> None:
        if self._is_shown:
            self._bar.stop()


def _patience() -> float:
    return 0.0 if _level == "verbose" else SECONDS


def _take_first() -> str | None:
    global _first
    line, _first = _first, None
    return None if line is None or _level == "quiet" else line()


def _print(text: str | None) -> None:
    if text is not None:
        _console().print(printable(redact(text)))


def _console() -> "Console":
    from rich.console import Console

    quiet = _level == "quiet" or not is_speaker()
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
