"""Prepared rows that are kept for the next run."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from phi3_jax.config.sections import DataSection
from phi3_jax.data import cache, prepare, prepare_data
from phi3_jax.data.rows import DataStats
from phi3_jax.system import files
from tests.helpers.disks import refusing
from tests.helpers.tokenizers import APRIL, JULY, phi3_tokenizer

PAIR = [{"role": "user", "content": "the hen"}, {"role": "assistant", "content": "12 ä"}]
ROWS = [{"messages": [{"role": "system", "content": "s"}, *PAIR]}, {"messages": PAIR}, {"messages": [*PAIR, *PAIR]}]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where entries lie; all rows are kept, however fast they were made."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(cache, "LEAST_SECONDS", 0.0)
    return tmp_path / "hub" / "phi3_jax" / "prepared"


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """How many rows were made each time that any were."""
    calls, tokenize_rows = [], prepare.tokenize_rows
    monkeypatch.setattr(
        prepare, "tokenize_rows", lambda rows, *a, **k: (calls.append(len(rows)), tokenize_rows(rows, *a, **k))[1]
    )
    return calls


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def prepared(data: DataSection, template: str = APRIL):
    return prepare_data(data, phi3_tokenizer(template), seed=0)


def same(one, other) -> bool:
    arrays = ("input_ids", "loss_mask", "offsets", "prompt_lengths")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and all(getattr(one, name).dtype == getattr(other, name).dtype for name in arrays)
        and (list(one.references), one.stats) == (list(other.references), other.stats)
        and [one.where(row) for row in range(len(one))] == [other.where(row) for row in range(len(other))]
    )


def test_the_second_start_takes_what_the_first_has_made(chats, folder, made, capfd):
    data = chats(*ROWS, max_length=24, eval_fraction=0.3)
    first, second = prepared(data), prepared(data)
    assert made == [2, 1]
    assert len(entries(folder)) == 2
    assert same(first.train, second.train)
    assert same(first.eval_sets["eval"], second.eval_sets["eval"])
    assert second.train.stats.notices  # what is to be said is said again
    assert not second.train.input_ids.flags.writeable
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("2 rows taken from the cache (")
    assert str(folder) in said[0]


def test_packing_is_looked_at_again(chats, folder, made):
    data = chats(*ROWS)
    efficiencies = [
        prepared(dataclasses.replace(data, packing=packing)).train.stats.packing_efficiency
        for packing in (True, False, True)
    ]
    assert made == [3]
    assert efficiencies[0] == efficiencies[2] > 0
    assert efficiencies[1] is None


@pytest.mark.parametrize("change", ["a byte", "template", "setting", "fewer"])
def test_other_rows_are_made(chats, folder, made, change):
    data, template = chats(*ROWS), APRIL
    prepared(data)
    if change == "a byte":
        Path(data.train).write_bytes(Path(data.train).read_bytes().replace(b"hen", b"han"))
    elif change == "template":
        template = JULY
    else:
        data = dataclasses.replace(data, **({"loss_on": "all"} if change == "setting" else {"max_rows": 2}))
    found = prepared(data, template)
    assert len(made) == 2
    assert same(found.train, prepared(dataclasses.replace(data, cache=False), template).train)


def test_what_is_made_in_no_time_and_what_is_not_wanted_is_not_kept(chats, folder, made, monkeypatch):
    data = chats(*ROWS)
    prepared(dataclasses.replace(data, cache=False))
    monkeypatch.setattr(cache, "LEAST_SECONDS", 100.0)
    prepared(data)
    assert made == [3, 3]
    assert not folder.exists()


def test_rows_that_are_wrong_are_told_as_ever(chats, folder):
    data = chats(*ROWS, {"messages": []})
    for _ in range(2):
        with pytest.raises(Exception, match="row 4"):
            prepared(data)
    assert not folder.exists()


def damage(entry: Path, kind: str) -> None:
    ids = entry / "input_ids.npy"
    if kind == "missing":
        ids.unlink()
    elif kind == "cut":
        os.truncate(ids, ids.stat().st_size - 4)
    elif kind == "a bit":
        content = bytearray(ids.read_bytes())
        content[-4] ^= 1
        ids.write_bytes(content)
    elif kind == "text":
        (entry / "rows.json").write_text((entry / "rows.json").read_text().replace("system", "sistem"))
    elif kind == "half":
        (entry / "manifest.json").unlink()
    elif kind == "elsewhere":
        shutil.move(ids, entry.parent / "ids")
        ids.symlink_to(entry.parent / "ids")
    else:
        shutil.rmtree(entry)
        entry.mkdir()


@pytest.mark.parametrize("kind", ["missing", "cut", "a bit", "text", "half", "elsewhere", "empty"])
def test_a_damaged_entry_is_made_again(chats, folder, made, capfd, kind):
    data = chats(*ROWS)
    first = prepared(data)
    [entry] = entries(folder)
    damage(entry, kind)
    assert same(prepared(data).train, first.train)
    assert made == [3, 3]
    [said] = capfd.readouterr().err.splitlines()
    assert said.startswith(f"{entry}: is damaged (")
    assert said.endswith("; the rows are prepared anew")
    prepared(data)
    assert made == [3, 3]  # the new one is whole


def write_forged(entry: Path, **changes: object) -> None:
    """An entry whose sums are right and whose content is not."""
    about = json.loads((entry / "rows.json").read_text())
    (entry / "manifest.json").unlink()
    (entry / "rows.json").write_text(json.dumps({**about, **changes}))
    cache.write_manifest(entry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "0" * 32}, "another's"),
        ({"sources": [1]}, "another's"),
        ({"sources": []}, "sources that are not there"),
        ({"stats": {}}, "statistics of other names"),
        ({"stats": {**DataStats().to_dict(), "rows": "1"}}, "rows is '1'"),
    ],
)
def test_what_an_entry_says_is_not_believed(chats, folder, changes, message):
    prepared(chats(*ROWS))
    [entry] = entries(folder)
    write_forged(entry, **changes)
    with pytest.raises(ValueError, match=message):
        cache.read_entry(entry)


def test_arrays_of_objects_are_not_read(chats, folder):
    prepared(chats(*ROWS))
    [entry] = entries(folder)
    np.save(entry / "input_ids.npy", np.array([print], object), allow_pickle=True)
    write_forged(entry)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        cache.read_entry(entry)
    (entry / "input_ids.npy").write_bytes(pickle.dumps(np.zeros(3, np.int32)))
    write_forged(entry)
    with pytest.raises(ValueError, match="pickled"):
        cache.read_entry(entry)


def test_two_runs_at_once_and_one_that_was_killed(chats, folder, made, monkeypatch):
    data = chats(*ROWS)
    abandoned = folder / f"new-{'0' * 32}"  # what a run leaves that was killed while it wrote
    abandoned.mkdir(parents=True)
    (abandoned / "input_ids.npy").write_bytes(b"half")
    write_manifest = cache.write_manifest

    def meanwhile(written: Path) -> None:
        monkeypatch.setattr(cache, "write_manifest", write_manifest)
        prepared(data)
        write_manifest(written)

    monkeypatch.setattr(cache, "write_manifest", meanwhile)
    first = prepared(data)
    assert made == [3, 3]
    assert len(entries(folder)) == 1
    assert same(prepared(data).train, first.train)
    assert made == [3, 3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_costs_the_cache_alone(chats, folder, made, monkeypatch, capfd, number):
    data = chats(*ROWS)
    monkeypatch.setattr(cache.np, "save", refusing(number))
    assert len(prepared(data).train) == 3
    [said] = capfd.readouterr().err.splitlines()
    assert said.startswith(f"the prepared rows are not kept: {folder}: cannot be written ({os.strerror(number)})")
    assert entries(folder) == []
    monkeypatch.undo()


def test_a_folder_that_cannot_be_there_costs_the_cache_alone(chats, tmp_path, folder, made, capfd):
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file")
    data = chats(*ROWS)
    prepared(data)
    prepared(data)
    assert made == [3, 3]
    assert "the prepared rows are not kept" in capfd.readouterr().err


def test_a_disk_that_is_nearly_full_is_left_to_the_run(chats, folder, monkeypatch, capfd):
    monkeypatch.setattr(cache, "free_bytes", lambda path: 100)
    prepared(chats(*ROWS))
    assert not folder.exists()
    assert "the prepared rows are not kept: they take" in capfd.readouterr().err


def test_what_was_used_longest_ago_goes_first(chats, folder, made, monkeypatch):
    data = [chats(*ROWS, max_length=length) for length in (22, 23, 24)]
    found = {}
    for each in data[:2]:
        prepared(each)
        [found[each.max_length]] = set(entries(folder)) - set(found.values())
    for age, entry in enumerate(found.values()):
        os.utime(entry, (1000 - age, 1000 - age))  # the second is older
    prepared(data[1])  # and used again
    size = sum(file.stat().st_size for file in found[22].iterdir())
    monkeypatch.setattr(cache, "MAX_BYTES", int(2.5 * size))
    (folder / f"old-{'0' * 32}").mkdir()  # a removal that was killed
    prepared(data[2])
    assert len(entries(folder)) == 2
    assert found[23] in entries(folder)
    assert found[22] not in entries(folder)
    assert made == [3, 3, 3]


def test_an_open_entry_can_be_taken_away(chats, folder):
    data = chats(*ROWS)
    prepared(data)
    rows = prepared(data).train
    expected = rows.input_ids.tolist()
    cache.drop_oldest(folder, 0)
    assert entries(folder) == []
    assert rows.input_ids.tolist() == expected


def test_the_folder_lies_in_the_hubs_home(monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", "/x/hf")
    assert cache.cache_folder() == Path("/x/hf/phi3_jax/prepared")


def test_entries_are_written_before_they_are_named(chats, folder, monkeypatch):
    """A run that is killed at any file of an entry leaves none behind under its name."""
    data = chats(*ROWS)
    seen = []
    save = np.save

    def look(*arguments, **options):
        seen.append([path.name[:4] for path in entries(folder)])
        save(*arguments, **options)

    monkeypatch.setattr(cache.np, "save", look)
    prepared(data)
    assert len(seen) == 8
    assert set(map(tuple, seen)) == {("new-",)}
    assert files.UNIQUE.fullmatch(entries(folder)[0].name)
