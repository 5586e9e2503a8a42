"""Files, folders and hub ids."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from phi3_jax.data.sources import load_sources, read_file
from phi3_jax.system.errors import InputError
from tests.helpers.data_hub import serve

ROWS = [{"prompt": "a", "completion": "007"}, {"prompt": "b, c\nd", "completion": "2024-01-31"}]


def rows_of(path, **kwargs):
    return [row for source in load_sources(str(path), **{"split": "train", **kwargs}) for row in list(source.rows)]


def write(path, rows=ROWS):
    kind = path.suffix[1:]
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(str(path))
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_gives_its_rows_with_texts_untouched(tmp_path, suffix):
    """Text that looks like a number or a date stays text."""
    assert rows_of(write(tmp_path / f"chats.{suffix}")) == ROWS


def test_a_json_file_may_hold_one_object_a_line_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "chats.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(json.dumps(row) for row in ROWS).encode())
    assert rows_of(path) == ROWS


def test_rows_need_not_have_the_same_columns_or_types(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": [{"x": 1}]}]}]
    assert rows_of(write(tmp_path / "a.jsonl", [*rows, {"text": "b"}])) == [*rows, {"text": "b"}]


def test_a_folder_gives_the_rows_of_all_its_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[:1])
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.csv", ROWS[1:])
    (tmp_path / "README.md").write_text("no data")
    assert rows_of(tmp_path) == ROWS


def test_a_folder_with_split_names_does_not_leak_test_rows(tmp_path):
    write(tmp_path / "chats-train.jsonl", ROWS[:1])
    write(tmp_path / "chats-test.jsonl", ROWS[1:])
    assert rows_of(tmp_path) == ROWS[:1]
    assert rows_of(tmp_path, split="test") == ROWS[1:]
    with pytest.raises(InputError, match="has the splits test, train, not 'dev'"):
        rows_of(tmp_path, split="dev")


def test_save_to_disk_folders(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table.select([0]), test=table.select([1])).save_to_disk(str(tmp_path / "two"))
    assert rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "two") == ROWS[:1]
    # For evaluation no split need be named: there is one that is meant for it.
    assert rows_of(tmp_path / "two", split=None) == ROWS[1:]
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a save_to_disk folder"):
        rows_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, row 2: is not JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, row 1: is not JSON"),
        ("a.jsonl", b"3\n", "a.jsonl, row 1: is a JSON int"),
        (
            "a.json",
            b'{"data": [\n {"a": 1}\n]}\n',
            "row 1: is not JSON .its line ends before the object does.; expected one",
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": {"b": 1, "c": 2, "b": 3}}\n', "row 2: has the key 'b' twice; leave one out"),
        ("a.json", b'[{"a": 1, "a": 1}]', "a.json: an object in it has the key 'a' twice"),
        ("a.json", b'[{"a": 1}, 2]', "a.json, row 2: is a JSON int"),
        ("a.json", b'[{"a": 1}, ', "a.json: cannot be read as JSON"),
        ("a.csv", b"a,b\n1,2,3\n", "row 1 has more fields"),
        ("a.csv", b"a,b\n\xff,2\n", "a.csv: cannot be read as CSV"),
        ("a.parquet", b"no parquet", "a.parquet: cannot be read as PARQUET"),
        ("a.txt", b"", "is a .txt file, expected one of .json"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        rows_of(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_told_without_pythons_words(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.jsonl").touch()
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read \(Permission denied\); see to the file$"):
        read_file(tmp_path / "a.jsonl", "a.jsonl")


def test_sources_that_are_not_there(tmp_path):
    for name in (tmp_path / "chats.jsonl", "chats.jsonl", "./chats", "a/b/c"):
        with pytest.raises(InputError, match="no such data file or folder"):
            rows_of(name)
    with pytest.raises(InputError, match="no data files in this folder"):
        rows_of(tmp_path)


def test_hub_ids(monkeypatch):
    splits = {"config": None}

    def split_names(name, config):
        if name == "owner/configs" and config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")
        if name == "owner/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/missing' doesn't exist")
        if name == "owner/offline":
            raise ConnectionError("Couldn't reach the hub\nat all")
        splits["config"] = config
        return ["train_sft", "test_sft"]

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)

    def load(name, config, split):
        return datasets.Dataset.from_list([{"text": f"{name} {config} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of("owner/name", split="train_sft") == [{"text": "owner/name None train_sft"}]
    assert rows_of("owner/configs", split="test_sft", dataset_config="main") == [
        {"text": "owner/configs main test_sft"}
    ]
    for name, message in {
        "owner/name": "has the splits train_sft, test_sft, not 'train'; set data.split",
        "owner/configs": r"Config name is missing. .*'main'\] Set data.dataset_config",
        "owner/missing": "no dataset on the hub that you may read",
        "owner/offline": r"the hub did not give it \(ConnectionError: Couldn't reach the hub\)",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            rows_of(name)
        assert "\n" not in str(caught.value)


ASK = """
from phi3_jax.data.sources import load_sources
from phi3_jax.system.errors import InputError
asked = [("owner/chats", "train"), ("owner/chats", None), ("owner/chats", "dev"),
    ("owner/script", "train"), ("owner/none", "train")]
for name, split in asked:
    try:
        [source] = load_sources(name, split=split)
        print(source.where(0), dict(source.rows[0]))
    except InputError as error:
        print(error)
from phi3_jax.config.sections import DataSection
from phi3_jax.data.row_streams import open_stream
print([(row.row.where, row.row.columns) for row in open_stream(DataSection(train="owner/chats", streaming=True))])
"""


def test_a_hub_that_speaks_its_protocol(tmp_path):
    """In a process of its own: the libraries read the hub's address when they are imported."""
    chats = {
        "README.md": b"---\nlicense: mit\n---\n",
        "train.jsonl": b'{"prompt": "a", "completion": "b"}\n',
        "test.jsonl": b'{"prompt": "c", "completion": "d"}\n',
    }
    script = {**chats, "script.py": b"raise SystemExit('remote code has run')"}
    with serve({"owner/chats": chats, "owner/script": script}) as url:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
        run = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == [
        "owner/chats[train], row 1 {'prompt': 'a', 'completion': 'b'}",
        "owner/chats[test], row 1 {'prompt': 'c', 'completion': 'd'}",
        "owner/chats: has the splits train, test, not 'dev'; set data.split",
        "owner/script: no such file or folder here, and the hub did not give it "
        "(RuntimeError: Dataset scripts are no longer supported, but found script.py)",
        "owner/none: no such file or folder here, and no dataset on the hub that you may read; check the name, "
        "or log in (`hf auth login`) if it is private",
        "[('owner/chats[train], row 1', {'prompt': 'a', 'completion': 'b'})]",
    ], run.stderr
