"""Dropout's mask: as often as asked for, without a pattern, and the same however a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from phi3_jax.model.dropout import DropoutKey, dropout, dropped, keeps, places_of, split_key, threefry

KEY = jax.random.key(3)


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((100, 100))
    out = dropout(x, 0.25, KEY)
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    assert abs(float(out.mean()) - 1) < 0.02
    assert dropout(x, 0.25, None) is x
    assert dropped(x, 0.0, KEY) == (x, 1.0)
    assert dropout(jnp.ones(8), 0.5, KEY).shape == (8,)  # without a batch


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_decisions_are_as_rare_as_asked_and_know_nothing_of_each_other(rate):
    """Within five standard deviations: of all, of each place and column, and of pairs some way apart."""
    kept = np.asarray(keeps(DropoutKey(KEY, places_of((2, 512))), 1024, rate)).reshape(1024, 1024)
    off = (~kept - rate) / np.sqrt(rate * (1 - rate))  # mean 0, variance 1
    assert abs(off.sum()) < 5 * 1024
    for axis in (0, 1):
        sums = off.sum(axis) / 32
        assert np.abs(sums).max() < 5
        assert 0.8 < np.var(sums) < 1.2  # neither drawn together nor evened out
        for step in (1, 2, 3, 4, 8, 64, 128, 512):
            assert abs((off * np.roll(off, step, axis)).sum()) < 5 * 1024
    assert abs((off * np.roll(off, (1, 1), (0, 1))).sum()) < 5 * 1024
    # Corners of rectangles: what would show that a place's part and a column's are but added.
    corners = off[::2, ::2] * off[1::2, ::2] * off[::2, 1::2] * off[1::2, 1::2]
    assert abs(corners.sum()) < 5 * 512


def test_another_key_is_another_mask_and_so_is_every_key_of_a_split():
    first, second = split_key(KEY, 2)
    masks = [np.asarray(dropout(jnp.ones((64, 64)), 0.5, key)) != 0 for key in (KEY, first, second)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0.45 < np.mean(masks[one] == masks[other]) < 0.55


def test_a_part_of_a_batch_is_dropped_as_in_the_whole():
    x, places = jnp.ones((4, 6, 8)), places_of((4, 6))
    whole = dropout(x, 0.5, KEY)
    rows = dropout(x[2:], 0.5, DropoutKey(KEY, places[2:]))
    np.testing.assert_array_equal(rows, whole[2:])
    columns = dropout(x[:, 3:], 0.5, DropoutKey(KEY, places[:, 3:]))
    np.testing.assert_array_equal(columns, whole[:, 3:])
    by_device = jax.vmap(lambda x, places: dropout(x, 0.5, split_key(DropoutKey(KEY, places), 2)[1]))
    grouped = by_device(x.reshape(2, 2, 6, 8), places.reshape(2, 2, 6))
    np.testing.assert_array_equal(grouped.reshape(x.shape), dropout(x, 0.5, split_key(KEY, 2)[1]))


def test_the_cipher_is_jaxs():
    key, numbers = jnp.array([7, 2**32 - 9], jnp.uint32), jnp.arange(5, dtype=jnp.uint32)
    theirs = threefry_2x32(key, jnp.concatenate([numbers, jnp.full(5, 1, jnp.uint32)]))
    np.testing.assert_array_equal(jnp.concatenate(threefry(key, numbers, 1)), theirs)
