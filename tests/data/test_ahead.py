"""Pieces that are worked on while the next one is prepared."""

import threading
import weakref
from collections.abc import Iterator

import pytest

from phi3_jax.data.ahead import ahead


def test_pieces_come_in_order_and_two_of_them_are_asked_for():
    asked = []

    def pieces() -> Iterator[int]:
        for number in range(5):
            asked.append(number)
            yield number

    for number, (piece, made) in enumerate(ahead(lambda piece: 10 * piece, pieces())):
        assert (piece, made) == (number, 10 * number)
        assert len(asked) == min(number + 2, 5)


def test_the_next_piece_is_prepared_while_one_is_made():
    prepared = threading.Event()

    def pieces() -> Iterator[int]:
        yield 0
        prepared.set()
        yield 1

    def make(piece: int) -> bool:
        return prepared.wait(60)  # for ever, if nobody asked for the next piece meanwhile

    assert next(ahead(make, pieces())) == (0, True)


def test_an_error_comes_in_its_pieces_turn():
    def make(piece: int) -> int:
        if piece == 1:
            raise ValueError("piece 1")
        return piece

    found = ahead(make, range(9))
    assert next(found) == (0, 0)
    with pytest.raises(ValueError, match="piece 1"):
        next(found)


class Piece:
    pass


def test_pieces_are_let_go():
    alive: list[weakref.ref[Piece]] = []

    def pieces() -> Iterator[Piece]:
        for _ in range(6):
            piece = Piece()
            alive.append(weakref.ref(piece))
            yield piece
            del piece

    for pair in ahead(lambda piece: None, pieces()):
        del pair
        assert sum(each() is not None for each in alive) <= 3


def test_who_stops_early_leaves_no_thread():
    found = ahead(str, range(9))
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
