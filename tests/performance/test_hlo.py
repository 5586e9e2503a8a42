"""Compiled programs' texts: what runs how often, what it moves, what it multiplies."""

import pytest

from phi3_jax.performance.hlo import Program
from tests.helpers.programs import STEP


@pytest.fixture(scope="module")
def program():
    return Program.of(STEP)


def found(program, name):
    return next(
        (computation, one) for computation, part in program.computations.items() for one in part if one.name == name
    )


def test_a_loop_runs_as_often_as_xla_knows_or_its_condition_says(program):
    times = {one.name: number for _, one, number in program.runs()}
    assert times["product"] == 32  # known_trip_count
    assert times["copy.1"] == 8  # the constant of the condition
    assert times["norm"] == 1


def test_of_branches_the_longest_counts(program):
    names = [one.name for _, one, _ in program.runs()]
    assert "slow" in names
    assert "quick" not in names


def test_what_neither_moves_nor_computes_is_left_out(program):
    assert not {one.opcode for _, one, _ in program.runs()} & {"parameter", "constant", "tuple", "bitcast", "while"}


def test_products_are_counted_by_their_shapes(program):
    assert program.flops(*found(program, "product")) == 2 * 4 * 2048 * 3072 * 16384
    # A batched product is a convolution whose window is the batch.
    assert program.flops(*found(program, "batched")) == 2 * 8 * 64 * 96 * 128
    assert program.flops(*found(program, "norm")) == 0


def test_a_fusion_reads_the_slice_that_it_takes_and_writes_where_it_writes(program):
    index = 4
    weights, x, y = 16384 * 3072 * 2, 4 * 2048 * 3072 * 2, 4 * 2048 * 16384 * 2
    assert program.bytes_moved(*found(program, "product")) == weights + x + y + index  # the weights of one layer
    # The same of a fusion within a fusion.
    assert program.bytes_moved(*found(program, "nested")) == 2 * weights + index
    # A row of eight is written in place; what lies nearer to the processor than the memory is not counted.
    assert program.bytes_moved(*found(program, "update")) == 4 * 2048 * 3072 * 2 + index


def test_tiles_that_are_not_full_are_counted_as_full(program):
    assert program.bytes_moved(*found(program, "copy.1")) == 2 * 64 * 128 * 4  # [64, 96] in tiles of 8 x 128
