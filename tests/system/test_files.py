"""Files that are there whole or not at all."""

import errno
import os

import pytest

from phi3_jax.system.files import StorageError, temporary_folder, write_text
from tests.helpers.disks import refusing


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"file\.json: cannot be written .* 3 bytes are needed"):
        write_text(path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.json": "old"}


def test_temporary_folders_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    dead, other, mine = tmp_path / f".out.{'0' * 32}", tmp_path / f".out2.{'0' * 32}", tmp_path / ".out.notes"
    for folder in (dead, other, mine):
        (folder / "part").mkdir(parents=True)
    with temporary_folder(tmp_path, ".out.") as first, temporary_folder(tmp_path, ".out.") as second:
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (first, second, other, mine)}
        (second / "part").mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([other, mine])
