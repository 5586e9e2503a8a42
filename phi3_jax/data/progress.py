"""What is shown while rows are prepared, where that takes a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phi3_jax.parallel.distributed import is_main
from phi3_jax.system.secrets import redact
from phi3_jax.system.text import printable

SECONDS = 2.0  # what takes less is not spoken of
_EVERY = 0.1  # seconds; to tell the bar of each row would take a tenth of the time that the rows take


def tell(text: str) -> None:
    """One line on standard error, from the first of several processes alone."""
    _console().print(printable(redact(text)))


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
        self._doing, self._total, self._done = doing, total, 0
        self._begun = self._looked = time.monotonic()
        console = _console()
        self._is_watched, self._is_shown = console.is_terminal and not console.quiet, False
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, *times, console=console, disable=not self._is_watched, transient=True)
        self._task = self._bar.add_task(doing, total=total)

    def advance(self, rows: int) -> None:
        self._done += rows
        now = time.monotonic()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        if not self._is_shown and now - self._begun > SECONDS:
            self._begin()
        if self._is_watched:
            self._bar.update(self._task, completed=self._done)

    def _begin(self) -> None:
        self._is_shown = True
        self._bar.start()
        if not self._is_watched:
            tell(f"{self._doing} {self._total:,} rows ...")

    def finish(self) -> None:
        if self._is_shown:
            self.stop()
            tell(f"{self._doing} {self._done:,} rows took {time.monotonic() - self._begun:.1f} s")

    def stop(self) -> None:
        if self._is_shown:
            self._bar.stop()


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not is_main())
