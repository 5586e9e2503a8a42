"""Work on one piece in a thread while the next one is prepared."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Made = TypeVar("Made")


def ahead(make: Callable[[Piece], Made], pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Made]]:
    """Each piece with what is made of it, in their order.

    Two of them are in memory: while the caller has one, the next is being made in a thread, which is of use where
    `make` leaves Python to itself most of the time, as the tokenizers library does. What `make` raises comes in its
    piece's turn.

    Args:
        make: Called with one piece at a time.
        pieces: Asked for one after the other, in the caller's thread.

    Example:
        >>> list(ahead(str.upper, ["a", "b", "c"]))
        [('a', 'A'), ('b', 'B'), ('c', 'C')]
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        waiting = None
        for piece in pieces:
            coming = piece, pool.submit(make, piece)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
            del piece, coming  # or they would outlive their turn
        if waiting is not None:
            yield waiting[0], waiting[1].result()
