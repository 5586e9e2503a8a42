"""Rows read one after the other."""

import gzip
import itertools
import json

import datasets
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import row_streams
from phi3_jax.data.row_streams import RowStream, open_stream
from phi3_jax.data.sources import load_sources
from phi3_jax.system.errors import InputError

ROWS = [{"prompt": f"{n} teas", "completion": f"0{n}"} for n in range(5)]


def section(path, **given) -> DataSection:
    return DataSection(train=str(path), streaming=True, **given)


def write(path):
    """The rows in a file or folder of the kind that its name says."""
    table = datasets.Dataset.from_list(ROWS)
    if path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, ROWS)).encode())
    elif path.suffix == ".arrow":
        table.save_to_disk(str(path.with_suffix("")))
        (path.with_suffix("") / "data-00000-of-00001.arrow").rename(path)
    elif path.suffix:
        getattr(table, f"to_{path.suffix[1:]}")(str(path))
    else:
        table.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow", "disk"])
def test_rows_and_their_names_are_those_of_the_whole_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr("phi3_jax.data.columnar._STREAMED", 2)  # rows of a batch
    path = write(tmp_path / name)
    stream = open_stream(section(path))
    [source] = load_sources(str(path), split="train")
    for _ in range(2):  # epochs
        rows = list(stream)
        assert [row.row.columns for row in rows] == ROWS
        assert [row.row.where for row in rows] == [source.where(index) for index in range(5)]
        assert [row.number for row in rows] == list(range(5))
        assert len({row.digest for row in rows}) == 5


def test_files_of_a_folder_follow_one_another(tmp_path):
    for name in ("b.jsonl", "a-train.csv", "c-train.parquet", "a-test.jsonl"):
        write(tmp_path / name)
    rows = list(open_stream(section(tmp_path)))
    assert [row.row.where for row in rows][4:6] == [
        f"{tmp_path / 'a-train.csv'}, row 5",
        f"{tmp_path / 'c-train.parquet'}, row 1",
    ]
    assert [row.number for row in rows] == list(range(10))
    assert len(list(open_stream(section(tmp_path, max_rows=7)))) == 7


def test_a_file_is_not_read_ahead_of_its_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(2000)))
    rows = iter(open_stream(section(path)))
    next(rows)
    path.write_text("")  # what comes now was not read before
    assert len(list(rows)) < 100


def test_a_hub_dataset_is_streamed(monkeypatch):
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(open_stream(section("owner/chats", dataset_config="main")))
    assert ([row.row.columns for row in rows], rows[1].row.where) == (ROWS, "owner/chats[train], row 2")
    assert asked == [("owner/chats", "main", "train", True)]


def test_rows_that_can_be_had_once_can_be_looked_at_before():
    stream = open_stream(DataSection(), (row for row in ROWS))
    assert [row.row.where for row in stream.first(2)] == ["train_dataset, row 1", "train_dataset, row 2"]
    assert [row.row.columns for row in stream] == ROWS
    assert list(stream) == []
    again = open_stream(DataSection(), lambda: iter(ROWS))
    assert len(again.first(2)) == 2
    assert [len(list(again)), len(list(again))] == [5, 5]


def test_an_endless_generator():
    stream = open_stream(DataSection(), lambda: ({"text": str(n)} for n in itertools.count()))
    assert isinstance(stream, RowStream)
    assert next(itertools.islice(iter(stream), 9, None)).row.columns == {"text": "9"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}]', "a.json: is one list, which cannot be read row by row; write one object a line"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl, row 2: is not JSON"),
        ("a.csv", b"text\na\nb,c\n", "a.csv: cannot be read any further .*row 2 has more fields"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read any further"),
        ("a.arrow", b"no arrow", "a.arrow: cannot be read as ARROW"),
        ("a.txt", gzip.compress(b"a", mtime=0), "is a .txt file, expected one of .json"),
        ("b.jsonl", None, "no such data file or folder"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        [row.row.columns for row in open_stream(section(tmp_path / name))]
    assert "\n" not in str(caught.value)


def test_what_the_callers_program_raises_is_the_callers():
    def rows():
        yield ROWS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(open_stream(DataSection(), rows))
    assert row_streams.TRAIN == "train_dataset"
