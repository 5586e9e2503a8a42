"""Rows packed into sequences as they come, of which only some are open at a time."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_OPEN = 64
# A sequence goes out once fewer than one position in so many is left: few rows are as short as that.
_FULL = 64


class OpenSequences(Generic[T]):
    """Puts each row where it leaves the least space, as `packing.best_fit` does with all rows at once.

    Args:
        capacity: Positions of a sequence.
        length: Of a row, at most `capacity`.
        most_open: How many sequences wait for further rows.

    Attributes:
        open: The rows of each that waits, in the order in which they were begun.

    Example:
        >>> sequences = OpenSequences(8, len, most_open=2)
        >>> [sequences.add(row) for row in ("aaaaa", "bbbbbb", "cc", "dddd")]
        [[], [], [['bbbbbb', 'cc']], []]
        >>> sequences.open
        [['aaaaa'], ['dddd']]
    """

    def __init__(self, capacity: int, length: Callable[[T], int], *, most_open: int = MOST_OPEN) -> None:
        self._capacity, self._length, self._most_open = capacity, length, most_open
        self.open: list[list[T]] = []
        self._left: list[int] = []  # positions of each

    def add(self, row: T) -> list[list[T]]:
        """Takes a row; the sequences that go out, which are at most one that makes place and one that is full."""
        length = self._length(row)
        fitting = [(space, index) for index, space in enumerate(self._left) if space >= length]
        gone: list[list[T]] = []
        if fitting:
            _, index = min(fitting)
        else:
            if len(self.open) == self._most_open:
                # The fullest, and of these the oldest.
                gone.append(self._close(self._left.index(min(self._left))))
            index = len(self.open)
            self.open.append([])
            self._left.append(self._capacity)
        self.open[index].append(row)
        self._left[index] -= length
        if self._left[index] * _FULL < self._capacity:
            gone.append(self._close(index))
        return gone

    def flush(self) -> list[list[T]]:
        """Has all go out."""
        gone = self.open
        self.restore([])
        return gone

    def restore(self, open: list[list[T]]) -> None:
        """Goes on with these sequences."""
        self.open = open
        self._left = [self._capacity - sum(map(self._length, rows)) for rows in open]

    def _close(self, index: int) -> list[T]:
        del self._left[index]
        return self.open.pop(index)
