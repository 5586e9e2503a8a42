"""Rows packed as they come."""

import random

from phi3_jax.data.open_sequences import OpenSequences


def packed(rows, capacity=32, most_open=8):
    sequences = OpenSequences(capacity, lambda row: row[1], most_open=most_open)
    gone = []
    for row in rows:
        gone += sequences.add(row)
        assert len(sequences.open) <= most_open
    return gone, sequences


def test_every_row_goes_out_once_in_sequences_that_hold_it():
    rng = random.Random(0)
    rows = [(number, rng.randint(1, 32)) for number in range(500)]
    gone, sequences = packed(rows)
    gone += sequences.flush()
    assert sequences.open == []
    assert sorted(row for sequence in gone for row in sequence) == rows
    sizes = [sum(length for _, length in sequence) for sequence in gone]
    assert max(sizes) <= 32
    assert sum(sizes) / (32 * len(sizes)) > 0.9


def test_a_sequence_goes_out_when_it_is_full_and_the_fullest_when_too_many_wait():
    gone, sequences = packed([(0, 20), (1, 24), (2, 8)], most_open=2)
    assert gone == [[(1, 24), (2, 8)]]
    gone, sequences = packed([(0, 20), (1, 24), (2, 24), (3, 30)], most_open=3)
    assert gone == [[(1, 24)]]  # of two that are equally full the older
    assert sequences.open == [[(0, 20)], [(2, 24)], [(3, 30)]]


def test_sequences_are_gone_on_with():
    _, first = packed([(0, 20), (1, 24)])
    second = OpenSequences(32, lambda row: row[1])
    second.restore([list(sequence) for sequence in first.open])
    rows = [(2, 9), (3, 12), (4, 7), (5, 1)]
    assert [first.add(row) for row in rows] == [second.add(row) for row in rows]
    assert first.open == second.open
