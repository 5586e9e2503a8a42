"""Which rows share a sequence, and in which order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_jax.config.sections import DataSection
from phi3_jax.data import eval_batches, train_batches
from phi3_jax.data.packing import Order, best_fit, grouped, plan_epoch
from phi3_jax.system.errors import InputError
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
    rows = make_rows(np.random.default_rng(0).integers(1, 200, 300))
    data = DataSection(max_length=256)
    plans = [plan_epoch(rows, data, Order(seed), epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1), (7, 0)]]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert len({len(plan) for plan in plans}) == 1


def test_without_shuffling_rows_come_in_order():
    data = DataSection(packing=False, shuffle=False, max_length=16)
    batches = train_batches(make_rows([3] * 5), data, batch_size=2, accumulation=1, epochs=2, seed=0, pad_id=PAD)
    assert [document[0] - 100 for batch in batches for document in documents(batch)] == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize(("number", "size"), [(1000, 2), (30, 4), (3, 8), (800, 1)])
def test_rows_of_like_length_are_grouped_as_transformers_does(number, size, monkeypatch):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    lengths = np.random.default_rng(1).permutation(number) + 1
    order = np.random.default_rng(2).permutation(number)
    monkeypatch.setattr(torch, "randperm", lambda count, generator=None: torch.tensor(order))
    expected = utils.get_length_grouped_indices(lengths.tolist(), size)
    assert grouped([[row] for row in order.tolist()], lengths, size) == [[row] for row in expected]


def test_grouped_epochs_differ_hold_every_row_and_go_on_where_they_stood():
    rows = make_rows(np.random.default_rng(0).integers(1, 60, 500))
    data = DataSection(packing=False, max_length=64)

    def batches():
        return train_batches(
            rows, data, batch_size=2, accumulation=2, epochs=2, seed=1, pad_id=PAD, group_by_length=True
        )

    running, again = batches(), batches()
    plans = [[again.step_rows(step)[1] for step in range(125 * epoch, 125 * epoch + 125)] for epoch in (0, 1)]
    assert plans[0] != plans[1]
    for plan in plans:
        assert sorted(itertools.chain.from_iterable(itertools.chain(*plan))) == list(range(500))
        spread = [np.ptp([rows.lengths[row] for [row] in step]) for step in plan]
        assert np.median(spread) <= 2
    assert rows.lengths[plans[0][0][0][0]] == rows.lengths.max()
    [next(running) for _ in range(130)]
    again.set_state(running.get_state())
    for step, other in zip(running, again, strict=True):
        np.testing.assert_array_equal(step["input_ids"], other["input_ids"])
    plain = train_batches(rows, data, batch_size=2, accumulation=2, epochs=2, seed=1, pad_id=PAD)
    with pytest.raises(InputError, match="other training rows, batch sizes or seed"):
        plain.set_state(running.get_state())


@pytest.mark.parametrize(("number", "steps", "kept"), [(11, 3, 10), (12, 3, 12), (9, 2, 8)])
def test_the_last_incomplete_batch_is_left_out_where_it_is_wanted(number, steps, kept):
    """As torch's DataLoader drops it: of a step that accumulates, the whole micro-batches stay."""
    data = DataSection(packing=False, shuffle=False, max_length=16)
    shape = {"batch_size": 2, "accumulation": 2, "epochs": 1, "seed": 0, "pad_id": PAD}
    batches = train_batches(make_rows([3] * number), data, **shape, drop_last=True)
    found = [document[0] - 100 for batch in batches for document in documents(batch)]
    assert (batches.steps_per_epoch, found) == (steps, list(range(kept)))
    with pytest.raises(InputError, match="dataloader_drop_last is true, but 1 row fill no batch of 2"):
        train_batches(make_rows([3]), data, **shape, drop_last=True)
