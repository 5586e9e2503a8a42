"""Which rows share a sequence, and in which order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.config.sections import DataSection
from phi3_jax.data import eval_batches, train_batches
from phi3_jax.data.packing import best_fit, plan_epoch
from tests.helpers.rows import make_rows

lengths_lists = st.lists(st.integers(1, 16), min_size=1, max_size=60)


PAD = 9


def documents(batch):
    """The documents in a batch of any leading shape, after checking positions, segments and padding."""
    found = []
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for ids, positions, segments, mask in zip(
        flat["input_ids"], flat["positions"], flat["segment_ids"], flat["loss_mask"], strict=True
    ):
        padding = segments == 0
        assert (ids[padding] == PAD).all()
        assert not positions[padding].any()
        assert not mask[padding].any()
        assert not padding[: (~padding).sum()].any()  # at the right end only
        assert sorted(set(segments[~padding])) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            assert (np.diff(where) == 1).all()
            assert positions[where].tolist() == list(range(len(where)))
            assert mask[where].tolist() == [0] + [1] * (len(where) - 1)
            found.append(ids[where].tolist())
    return found


@given(lengths_lists)
@settings(deadline=None)
def test_best_fit_fits_and_loses_nothing(lengths):
    bins = best_fit(np.array(lengths), np.arange(len(lengths)), 16)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 16 for rows in bins)
    # Best fit never leaves two bins that one could hold.
    loads = sorted(sum(lengths[row] for row in rows) for rows in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > 16


def test_best_fit_takes_the_tightest_bin():
    # After 10 and 12 there are 6 and 4 positions left: 4 goes beside 12 though 10 came first.
    assert best_fit(np.array([10, 12, 4, 6]), np.arange(4), 16) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="row 0 has 17 tokens"):
        best_fit(np.array([17]), np.arange(1), 16)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@given(lengths=lengths_lists, batch_size=st.integers(1, 3), accumulation=st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_an_epoch_holds_every_document_once(packing, shuffle, lengths, batch_size, accumulation):
    data = DataSection(packing=packing, shuffle=shuffle, max_length=16)
    rows = make_rows(lengths)
    batches = train_batches(rows, data, batch_size=batch_size, accumulation=accumulation, epochs=2, seed=1, pad_id=PAD)
    everything = list(batches)
    assert len(everything) == 2 * batches.steps_per_epoch
    expected = sorted(rows[i][0].tolist() for i in range(len(rows)))
    for epoch in range(2):
        steps = everything[epoch * batches.steps_per_epoch :][: batches.steps_per_epoch]
        assert sorted(itertools.chain(*(documents(step) for step in steps))) == expected
    for step in everything:
        assert set(step) == {"input_ids", "positions", "segment_ids", "loss_mask"}
        assert all(array.shape == (accumulation, batch_size, 16) for array in step.values())
        assert all(array.dtype == np.int32 for array in step.values())
    again = list(eval_batches(rows, data, batch_size=batch_size, pad_id=PAD))
    assert sorted(itertools.chain(*(documents(batch) for batch in again))) == expected
    assert all(batch["input_ids"].shape == (batch_size, 16) for batch in again)


def test_epochs_differ_in_order_and_not_in_number():
    lengths = np.random.default_rng(0).integers(1, 200, 300)
    data = DataSection(max_length=256)
    plans = [plan_epoch(lengths, data, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1), (7, 0)]]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert len({len(plan) for plan in plans}) == 1


def test_without_shuffling_rows_come_in_order():
    data = DataSection(packing=False, shuffle=False, max_length=16)
    batches = train_batches(make_rows([3] * 5), data, batch_size=2, accumulation=1, epochs=2, seed=0, pad_id=PAD)
    assert [document[0] - 100 for batch in batches for document in documents(batch)] == [0, 1, 2, 3, 4] * 2
