"""Some hundred cases of scripts/fuzz.py for every reader; the script itself runs ten thousand."""

import random
import sys
from pathlib import Path

import pytest

from phi3_jax.system.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Those that take long need fewer, and the script has the rest.
CASES = {"checkpoint": 80, "config": 120, "run": 120, "tokenizer": 60, "disk": 100}
READERS = ("header", "config", "checkpoint", "adapter", "run", "tokenizer", "jsonl", "json", "csv", "parquet", "disk")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import fuzz
        import fuzz_readers

        assert tuple(fuzz_readers.READERS) == READERS
        yield fuzz
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, script, tmp_path):
    cases = range(10**6, 10**6 + CASES.get(name, 200))  # not those of a run of the script
    summary = script.fuzz(name, cases, tmp_path, seconds=30.0)
    assert summary.failures == []
    assert summary.outcomes[name].total() == len(cases)
    # Damage that no reader notices, or that none survives, would test nothing.
    assert summary.outcomes[name]["refused"] > len(cases) / 4
    assert summary.outcomes[name]["read"] > 0


@pytest.mark.parametrize(
    ("reads", "seconds", "told"),
    [
        (lambda folder: {}["x"], 30.0, "KeyError"),
        (lambda folder: bytearray(300 * 2**20), 30.0, "300 MiB"),
        (lambda folder: [None for _ in iter(int, 1)], 0.2, "more than 0.2 s"),
        (lambda folder: sys.exit(), 30.0, "SystemExit"),
    ],
    ids=["another error", "memory", "no end", "an exit"],
)
def test_what_must_not_happen_is_told(reads, seconds, told, script, tmp_path, monkeypatch):
    calls = []

    def read(folder):
        calls.append(folder)
        return None if len(calls) == 1 else reads(folder)  # the whole files are read

    reader = script.READERS["jsonl"]
    monkeypatch.setitem(script.READERS, "jsonl", type(reader)(reader.write, read))
    summary = script.fuzz("jsonl", [0], tmp_path, seconds=seconds)
    (failure,) = summary.failures
    assert told in failure
    assert (tmp_path / "jsonl-0").exists()  # to look at


def test_an_error_of_several_lines_is_a_failure(script, tmp_path, monkeypatch):
    class Raw(InputError):
        def __init__(self, message):
            ValueError.__init__(self, message)

    def read(folder):
        if folder.name != "whole":
            raise Raw("a\nb\x1b")

    reader = script.READERS["jsonl"]
    monkeypatch.setitem(script.READERS, "jsonl", type(reader)(reader.write, read))
    assert "several lines" in script.fuzz("jsonl", [0], tmp_path).failures[0]


def test_a_case_is_made_by_its_number_alone(script, tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        script.READERS["jsonl"].write(folder)
        script.damage(folder / "rows.jsonl", random.Random("jsonl 7"))
        found.append((folder / "rows.jsonl").read_bytes())
    assert found[0] == found[1]
