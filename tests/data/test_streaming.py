"""Batches of streamed rows."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.row_streams import open_stream
from phi3_jax.data.streaming import KEPT_STEPS, StreamedRows
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import tiny_tokenizer

# Each is told by its first words: the n-th holds n + 1 of "a".
ROWS = [{"prompt": " ".join("a" * (1 + n % 12)) + " b" * (n // 12), "completion": "c"} for n in range(60)]
CHAT = ChatTokenizer(tiny_tokenizer())
SHAPE = {"batch_size": 2, "accumulation": 2, "seed": 3, "pad_id": 0}


@pytest.fixture
def open_batches():
    """Makes streamed rows and their batches, which end with the test."""
    opened = []

    def make(rows=ROWS, *, shape=SHAPE, **data):
        section = DataSection(**{"streaming": True, "max_length": 64, "shuffle_buffer_size": 16, **data})
        streamed = StreamedRows(open_stream(section, rows), CHAT, section)
        batches = streamed.batches(**shape)
        opened.append(batches)
        return streamed, batches

    yield make
    for batches in opened:
        batches.close()


def documents(batch) -> list[tuple[int, ...]]:
    """The tokens of every row of a batch."""
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    return [
        tuple(ids[segments == segment].tolist())
        for ids, segments in zip(flat["input_ids"], flat["segment_ids"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_batches_hold_every_row_once_an_epoch(open_batches, packing):
    streamed, batches = open_batches((row for row in ROWS), packing=packing)  # which has one epoch
    everything = list(batches)
    found = Counter(row for batch in everything for row in documents(batch))
    _, again = open_batches(packing=packing, shape={**SHAPE, "epochs": 2})
    assert Counter(row for batch in again for row in documents(batch)) == found + found
    assert sum(found.values()) == 60
    for batch in everything:
        assert batch["input_ids"].shape[:2] == (2, 2)
        assert batch["input_ids"].shape[2] == 64
        restart = np.diff(batch["segment_ids"], axis=-1) > 0
        assert not batch["positions"][..., 1:][restart].any()
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()
    assert streamed.stats.rows == 60
    assert streamed.stats.tokens == sum(map(len, found.elements()))
    assert streamed.stats.target_tokens == sum(int(batch["loss_mask"].sum()) for batch in everything)
    if packing:
        assert streamed.stats.packing_efficiency == pytest.approx(
            streamed.stats.tokens / (64 * sum((batch["segment_ids"].max(-1) > 0).sum() for batch in everything))
        )
        assert streamed.stats.packing_efficiency > 0.8


@pytest.mark.parametrize("packing", [True, False])
def test_it_goes_on_with_the_very_batch_that_would_have_come_next(open_batches, packing):
    _, whole = open_batches(packing=packing)
    states, expected = [whole.get_state()], []
    for _ in range(10):
        expected.append(next(whole))
        states.append(json.loads(json.dumps(whole.get_state())))
    assert (whole.epochs_at(10) > 0) == packing  # of the others the first epoch is not over
    for taken in (0, 1, 4, 9):
        streamed, again = open_batches(packing=packing)
        again.set_state(states[taken])
        counted = streamed.stats.rows
        for step in range(taken, 10):
            batch = next(again)
            assert all(np.array_equal(batch[name], expected[step][name]) for name in expected[step])
            assert json.loads(json.dumps(again.get_state())) == states[step + 1]
        assert counted == sum(len(documents(batch)) for batch in expected[:taken])


def test_a_state_is_small_whatever_the_source_and_of_the_batch_that_was_given_out(open_batches):
    _, batches = open_batches(ROWS * 50, shuffle_buffer_size=1000)
    for _ in range(20):
        next(batches)
    assert len(json.dumps(batches.get_state())) < 4000
    assert batches.get_state()["counts"]["steps"] == 20  # though others wait


def test_parts_of_several_processes_are_the_whole(open_batches):
    _, whole = open_batches()
    parts = [open_batches(shape={**SHAPE, "part": part})[1] for part in ([0], [1])]
    assert parts[0].fingerprint == parts[1].fingerprint == whole.fingerprint
    for _ in range(4):
        batch, *halves = next(whole), *map(next, parts)
        for name in batch:
            assert np.array_equal(np.concatenate([half[name] for half in halves], axis=1), batch[name])
    parts[1].set_state(parts[0].get_state())
    assert np.array_equal(next(parts[1])["input_ids"], next(whole)["input_ids"][:, 1:])


def test_other_settings_and_other_rows_are_refused(open_batches):
    _, batches = open_batches()
    for _ in range(5):
        next(batches)
    for change in ({"shape": {**SHAPE, "seed": 4}}, {"max_length": 48}, {"rows": ROWS[::-1]}, {"loss_on": "all"}):
        with pytest.raises(InputError, match="other training rows, batch sizes or seed"):
            open_batches(**change)[1].set_state(batches.get_state())


class Alive:
    """Rows of a source that are in memory."""

    def __init__(self, count):
        self.count, self.now, self.most = count, 0, 0

    def __call__(self):
        for n in range(self.count):
            self.now += 1
            self.most = max(self.most, self.now)
            yield Counted(self, **ROWS[n % 60])


class Counted(dict):
    def __init__(self, alive, **columns):
        super().__init__(**columns)
        self.alive = alive

    def __del__(self):
        self.alive.now -= 1


def test_memory_does_not_grow_with_the_source(open_batches):
    """By the rows that are alive: the buffer, a chunk, those that wait in sequences, batches made beforehand."""

    def most(count):
        alive = Alive(count)
        _, batches = open_batches(alive, shape={**SHAPE, "epochs": 1})
        assert sum(len(documents(batch)) for batch in batches) == count
        batches.close()
        return alive.most

    assert most(3000) <= most(300) + 100


def test_rows_of_the_last_steps_are_known(open_batches):
    _, batches = open_batches()
    given = [next(batches) for _ in range(KEPT_STEPS + 2)]
    rows, sequences = batches.step_rows(KEPT_STEPS + 1)
    assert [tuple(rows[row][0].tolist()) for sequence in sequences for row in sequence] == documents(given[-1])
    assert rows.where(0).startswith("train_dataset, row ")
    assert all(np.array_equal(batches.batch_of(KEPT_STEPS)[name], given[-2][name]) for name in given[-2])
    assert batches.step_rows(1) is None


def test_what_is_wrong_with_a_row_is_told_when_it_is_met(open_batches):
    rows = [*ROWS * 10, {"prompt": "a", "answer": "c"}]
    _, batches = open_batches(rows, packing=False)
    with pytest.raises(InputError, match="train_dataset, row 601: the columns prompt, answer fit no format"):
        list(batches)
    assert batches.get_state()["counts"]["steps"] > 100  # of the last batch that was given out
    for given, message in (([], "the data is empty"), (rows[-1:], "row 1: the columns prompt, answer")):
        with pytest.raises(InputError, match=message):
            open_batches(given)
    with pytest.raises(InputError, match="none of the first 2 rows has anything to train on"):
        open_batches([{"prompt": "a", "completion": ""}] * 2, skip_empty=True)


def test_a_line_says_how_rows_come_and_then_what_became_of_them(open_batches):
    streamed, batches = open_batches()
    assert streamed.summary() == "train: streamed from train_dataset, shuffled through a buffer of 16 rows"
    next(batches)
    assert streamed.summary().startswith(f"train, streamed: {streamed.stats.rows} rows, ")


PEAK = """
import sys
from phi3_jax.config.sections import DataSection
from phi3_jax.data.run_data import load_data
from phi3_jax.system.memory import resident_peak
from tests.helpers.tokenizers import tiny_tokenizer
data = DataSection(train=sys.argv[1], streaming=True, max_length=256, shuffle_buffer_size=100)
loaded = load_data(data, tiny_tokenizer(), seed=0)
batches = loaded.train.batches(batch_size=4, accumulation=1, seed=0, pad_id=0, epochs=1)
for _ in batches:
    pass
batches.close()
print(loaded.train.stats.rows, resident_peak() // 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_ten_times_as_large_takes_no_more_memory(tmp_path, suffix):
    peaks = []
    for count in (600, 6000):  # 12 and 120 MB
        notes = [f"{n}" * 5000 for n in range(1000, 1000 + count)]
        rows = [{"prompt": f"{len(note)} teas", "completion": "c", "note": note} for note in notes]
        path = tmp_path / f"{count}.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = pyarrow.Table.from_pylist(rows)
            parquet.write_table(table, path, row_group_size=300, compression="none", use_dictionary=False)
        run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        seen, peak = map(int, run.stdout.split())
        assert seen == count
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 40, peaks  # MiB
