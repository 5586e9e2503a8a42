"""Shuffled and rendered rows, and where they stand."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.rendered_stream import RenderedStream, shuffled
from phi3_jax.data.row_streams import open_stream
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import tiny_tokenizer

ROWS = [{"prompt": "a" * (1 + n % 5), "completion": "bc"[n % 2]} for n in range(90)]
CHAT = ChatTokenizer(tiny_tokenizer())


def rendered(rows=ROWS, *, seed=0, epochs=None, buffer=8, **data) -> RenderedStream:
    section = DataSection(streaming=True, **{"shuffle_buffer_size": buffer, **data} if buffer else data)
    return RenderedStream(open_stream(section, rows), CHAT, section, seed=seed, epochs=epochs)


def test_a_buffer_gives_every_row_once_and_none_early():
    order = list(shuffled(range(1000), 50, np.random.default_rng(0)))
    assert sorted(order) == list(range(1000))
    assert order != sorted(order)
    # The n-th row to leave was among the first n + 50.
    assert all(row < place + 50 for place, row in enumerate(order))
    assert max(place - row for place, row in enumerate(order)) > 50  # some wait long


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    def orders(seed):
        numbers = [row.number for row in rendered(seed=seed, epochs=3)]
        return [numbers[start : start + 90] for start in (0, 90, 180)]

    first = orders(0)
    assert all(sorted(order) == list(range(90)) for order in first)
    assert len({tuple(order) for order in (*first, *orders(1))}) == 6
    assert orders(0) == first
    unshuffled = rendered(epochs=2, buffer=None, shuffle=False)
    assert [row.number for row in unshuffled] == [*range(90), *range(90)]


@pytest.mark.parametrize("taken", [0, 1, 31, 32, 33, 89, 90, 91, 150])
def test_it_goes_on_where_it_was(taken):
    whole = rendered()
    before = [next(whole).number for _ in range(taken)]
    position = json.loads(json.dumps(whole.position))
    again = rendered()
    wanted = set(before[-3:])  # of the epoch before, too
    kept = again.restore(position, wanted)
    assert {number: row.number for number, row in kept.items()} == {number: number for number in wanted}
    for _ in range(100):
        expected, found = next(whole), next(again)
        assert (expected.number, expected.row.ids.tolist()) == (found.number, found.row.ids.tolist())
        assert whole.position == again.position


def test_what_was_used_is_read_again_and_not_rendered(monkeypatch):
    seen = []

    def rows():
        for n in range(300):
            seen.append(n)
            yield ROWS[n % 90]

    whole = rendered(rows)
    for _ in range(200):
        next(whole)
    seen.clear()
    again = rendered(rows)
    encode, documents = again._chat.encode, []
    monkeypatch.setattr(again._chat, "encode", lambda chunk: (documents.extend(chunk), encode(chunk))[1])
    again.restore(whole.position, [5])
    assert len(documents) <= 32 + 1
    assert len(seen) < 200 + 8 + 2 * 32


def test_rows_that_have_changed_are_noticed():
    whole = rendered()
    for _ in range(40):
        next(whole)
    for other in (ROWS[::-1], [{**ROWS[0], "completion": "x"}, *ROWS[1:]], ROWS[:20]):
        with pytest.raises(InputError, match="other training rows"):
            rendered(other).restore(whole.position, [])
    # One that nothing has been made of yet may be mended.
    assert rendered([*ROWS[:-1], {"prompt": "c", "completion": "c"}]).restore(whole.position, []) == {}


def test_rows_with_nothing_to_train_on_are_counted_and_the_same_after_resuming():
    rows = [row if n % 3 else {"prompt": "a", "completion": " "} for n, row in enumerate(ROWS)]
    whole = rendered(rows, epochs=1, skip_empty=True)
    for _ in range(25):
        next(whole)
    again = rendered(rows, epochs=1, skip_empty=True)
    again.restore(whole.position, [])
    assert [row.number for row in again] == [row.number for row in whole]
    assert again.stats == whole.stats
    assert whole.stats.skipped == 30
    with pytest.raises(InputError, match="no usable rows; all 5 have nothing to train on"):
        next(rendered([{"prompt": "a", "completion": " "}] * 5, skip_empty=True))
    with pytest.raises(InputError, match="train_dataset, row 1: its assistant turns are blank"):
        next(rendered(rows, buffer=None, shuffle=False))


def test_a_generator_gives_one_epoch_and_a_function_as_many_as_are_asked_for():
    assert Counter(row.number for row in rendered(row for row in ROWS)) == Counter(range(90))
    assert len(list(itertools.islice(rendered(lambda: iter(ROWS)), 300))) == 300


@pytest.mark.parametrize("data", [{}, {"buffer": None, "shuffle": False}])
def test_a_generator_is_gone_on_with_when_it_is_given_anew(data):
    whole = rendered((row for row in ROWS), **data)
    before = [next(whole).number for _ in range(40)]
    again = rendered((row for row in ROWS), **data)
    again.restore(whole.position, before[-2:])
    assert [row.number for row in again] == [row.number for row in whole]
    used = rendered(generator := (row for row in ROWS), **data)
    next(used)
    with pytest.raises(InputError, match="other training rows"):
        rendered(generator, **data).restore(whole.position, [])
