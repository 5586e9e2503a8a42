"""Attention in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.model import flash
from phi3_jax.model.attention import run_kind
from phi3_jax.model.flash import visible
from tests.helpers.attention import inputs, packed, program, segments


def test_mask():
    ids = packed(30)
    seen = visible(ids, ids, 0, 0, 7)[:, None]
    for row in range(2):
        for query in range(30):
            expected = [k for k in range(query - 6, query + 1) if k >= 0 and ids[row, k] == ids[row, query]]
            assert np.flatnonzero(seen[row, 0, query]).tolist() == expected


def test_hidden_blocks_are_not_computed():
    """What is hidden from a document spoils it if it is touched: a NaN times a weight of zero is a NaN."""
    size = flash._block_size(1024)
    q, k, v, d_out = inputs(4 * size, 2, 1, batch=3)
    ids = segments(*[((1, size), (2, 2 * size), (3, size))] * 3)
    spoiled = (slice(0, size), slice(size, 4 * size), slice(0, 1))  # a row's keys that are NaN

    def finite(window, ids):
        """Where the output and the gradient of q are numbers."""
        k_nan, v_nan = k, v
        for row, keys in enumerate(spoiled):
            k_nan, v_nan = k_nan.at[row, keys].set(jnp.nan), v_nan.at[row, keys].set(jnp.nan)
        out, dq, *_ = program("chunked", window)(q, k_nan, v_nan, d_out, ids)
        return jnp.isfinite(out).all(axis=(2, 3)) & jnp.isfinite(dq).all(axis=(2, 3))

    by_document = finite(None, ids)
    assert by_document[0, size:].all()  # of the document before
    assert by_document[1, :size].all()  # of the future
    assert not by_document[2, :size].any()  # visible
    in_window = finite(20, jnp.ones_like(ids))
    assert in_window[0, 2 * size :].all()  # beyond the window
    assert not in_window[0, :size].any()


def test_block_ranges():
    """First block and end for blocks of 4, over two rows, and for a part of the row that starts at 8."""
    rows = segments(((1, 6), (2, 6), (3, 3), (0, 1)), ((1, 8), (2, 8)))
    padded_rows = segments(((0, 8), (5, 8)))

    @jax.jit
    def ranges(rows, padded_rows, start):
        blocks, padded = flash._cut_segments(rows, 4), flash._cut_segments(padded_rows, 4)
        whole = [flash.block_ranges(blocks, blocks, 0, window) for window in (None, 2, 1)]
        part = flash.block_ranges(blocks[2:], blocks, start, None)
        return [*whole, part, flash.block_ranges(padded, padded, 0, None)]

    found = ranges(rows, padded_rows, jnp.int32(8))
    by_document, two, one, part, padded = (list(zip(*np.array(pair).tolist(), strict=True)) for pair in found)
    assert by_document == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert two == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert one == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert part == [(1, 3), (2, 4)]
    assert padded == [(0, 1), (0, 2), (2, 3), (2, 4)]


@pytest.mark.optimized
def test_chunked_needs_memory_linear_in_length():
    def temporary(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        total = jax.grad(lambda q, k, v, ids: jnp.sum(run_kind("chunked", q, k, v, ids, None)), (0, 1, 2))
        compiled = jax.jit(total).lower(*arrays, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 4.5 * temporary(1024)
