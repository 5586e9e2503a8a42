"""Packing, batches, their order, and resuming."""

import itertools
import json

import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import eval_batches, train_batches
from phi3_jax.data.pipeline import sequence_length
from phi3_jax.system.errors import InputError
from tests.helpers.rows import make_rows

PAD = 9


@pytest.mark.parametrize("packing", [True, False])
def test_resuming_gives_the_very_batches_that_would_have_come(packing):
    rows = make_rows(np.random.default_rng(0).integers(1, 100, 97).tolist())
    data = DataSection(packing=packing, max_length=128)

    def start(seed=3):
        return train_batches(rows, data, batch_size=2, accumulation=2, epochs=None, seed=seed, pad_id=PAD)

    batches = start()
    for taken in (0, 1, batches.steps_per_epoch, 2 * batches.steps_per_epoch + 1):
        batches = start()
        for _ in range(taken):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [next(batches) for _ in range(batches.steps_per_epoch + 1)]
        resumed = start()
        next(resumed)  # a state replaces whatever was read before
        resumed.set_state(state)
        for batch in expected:
            other = next(resumed)
            for name, array in batch.items():
                np.testing.assert_array_equal(array, other[name])
    with pytest.raises(InputError, match="other training rows, batch sizes or seed"):
        start(seed=4).set_state(state)


def test_buckets_are_few_and_hold_the_longest_row():
    assert [sequence_length(n, 1000) for n in (1, 64, 65, 128, 129, 512, 513, 1000)] == [
        64, 64, 128, 128, 256, 512, 1000, 1000
    ]  # fmt: skip
    assert sequence_length(10, 48) == 48
    data = DataSection(packing=False, max_length=1000, shuffle=False)
    batches = train_batches(make_rows([3, 70, 5, 6]), data, batch_size=1, accumulation=2, epochs=1, seed=0, pad_id=PAD)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 1, 128), (2, 1, 64)]


@pytest.mark.parametrize("packing", [True, False])
def test_processes_that_share_batches_put_together_the_whole(packing):
    rows = make_rows([200, *range(20, 49)])
    data = DataSection(packing=packing, max_length=256)
    parts = [(0, 2), (3,), (1,)]  # not neighbours, not equally many

    def share(part=None):
        return train_batches(rows, data, batch_size=4, accumulation=2, epochs=2, seed=3, pad_id=PAD, part=part)

    assert len({share(part).fingerprint for part in (None, *parts)}) == 1
    lengths = set()
    for whole, *shares in zip(share(), *map(share, parts), strict=True):
        lengths.add(whole["input_ids"].shape[-1])
        for name, array in whole.items():
            for part, batch in zip(parts, shares, strict=True):
                np.testing.assert_array_equal(batch[name], array[:, part])
    assert len(lengths) == (1 if packing else 2)  # by the longest row of all, whoever has it
    evaluation = [eval_batches(rows, data, batch_size=4, pad_id=PAD, part=part) for part in (None, *parts)]
    for whole, *shares in zip(*evaluation, strict=True):
        for name, array in whole.items():
            for part, batch in zip(parts, shares, strict=True):
                np.testing.assert_array_equal(batch[name], array[list(part)])
    # A state that one process saved is good for all.
    first, second = share(parts[0]), share(parts[1])
    next(first)
    second.set_state(first.get_state())
    following = [next(stream)["input_ids"] for stream in (first, second)]
    whole = list(itertools.islice(share(), 2))[1]["input_ids"]
    for array, part in zip(following, parts, strict=False):
        np.testing.assert_array_equal(array, whole[:, part])
