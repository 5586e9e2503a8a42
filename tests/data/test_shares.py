"""Rows that several processes prepare together; tests/parallel/test_distributed.py has two of them do it."""

from types import SimpleNamespace

import numpy as np
import pytest

from phi3_jax.data import shares
from phi3_jax.data.rows import DataStats
from phi3_jax.system.errors import InputError


@pytest.mark.parametrize(("rows", "processes"), [(10, 1), (10, 3), (2, 5)])
def test_shares_are_neighbours_and_all_of_it(rows, processes, monkeypatch):
    found = []
    for process in range(processes):
        state = SimpleNamespace(process_id=process, num_processes=processes)
        monkeypatch.setattr(shares, "distributed_state", lambda state=state: state)
        found.append(shares.own_share(range(rows)))
    assert [row for share in found for row in share] == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_one_process_is_its_own_share():
    arrays = {"input_ids": np.arange(5), "offsets": np.array([0, 2, 5])}
    whole = shares.all_of(arrays)
    assert {name: array.tolist() for name, array in whole.items()} == {
        "input_ids": [0, 1, 2, 3, 4],
        "offsets": [0, 2, 5],
    }
    assert shares.all_counts(DataStats(["a"], skipped=2)) == DataStats(["a"], skipped=2)
    assert shares.made_together(lambda: 5) == 5


def test_counts_of_shares_are_put_together(monkeypatch):
    parts = [
        DataStats(["a"], skipped=1, longest=7, notices=["x"]),
        DataStats(["a"], skipped=2, longest=5, notices=["y"]),
    ]
    monkeypatch.setattr(shares, "exchange", lambda text: [shares.json.dumps(part.to_dict()) for part in parts])
    assert shares.all_counts(parts[1]) == DataStats(["a"], skipped=3, longest=7, notices=["x", "y"])


def test_the_first_processes_error_is_everybodys(monkeypatch):
    monkeypatch.setattr(shares, "exchange", lambda text: ["", "x.jsonl, row 2: is blank", text])

    def fail() -> None:
        raise InputError("x.jsonl, row 9: is blank")

    for make in (fail, lambda: None):
        with pytest.raises(InputError, match=r"row 2: is blank"):
            shares.made_together(make)
