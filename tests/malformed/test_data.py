"""Rows that nobody can train on: each refused in one line, with nothing left behind."""

import json
from pathlib import Path

import pytest

from tests.helpers.worlds import World, pipe, refusal, text, void, words_missing

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def rows(*values: object) -> str:
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def turns(*values: object) -> str:
    return rows(GOOD, {"messages": list(values)})


ANSWER = {"role": "assistant", "content": "b"}
FILES = [
    ("nothing", "train", "a.jsonl", "", "a.jsonl | no usable rows"),
    ("blank lines", "evaluate", "a.jsonl", "\n \n", "a.jsonl | no usable rows"),
    ("half a row", "train", "a.jsonl", rows(GOOD, '{"a": '), "a.jsonl, row 2 | is not JSON"),
    ("a number of 5,000 digits", "train", "a.jsonl", rows(GOOD, f'{{"a": {"9" * 5000}}}'), "a.jsonl, row 2 | not JSON"),
    ("nesting without end", "evaluate", "a.jsonl", rows(GOOD, '{"a": ' + "[" * 9000), "a.jsonl, row 2 | is not JSON"),
    ("bytes", "train", "a.jsonl", b'{"text": "\xff"}', "a.jsonl, row 1 | is not JSON"),
    ("a number for a row", "train", "a.jsonl", rows(GOOD, 7), "a.jsonl, row 2 | int"),
    ("unknown columns", "train", "a.jsonl", rows({"\x1b[31mcolour": 1}), r"a.jsonl, row 1 | \x1b[31mcolour"),
    ("turns of a number", "evaluate", "a.jsonl", rows({"messages": 3}), "row 1 | int"),
    ("turns of broken text", "train", "a.jsonl", rows({"messages": "[{"}), "row 1 | not JSON"),
    ("nested turns in text", "train", "a.jsonl", rows({"messages": "[" * 9000}), "row 1 | not JSON"),
    ("a turn of text", "train", "a.jsonl", turns("hi"), "row 2, turn 1 | str"),
    ("an unknown role", "train", "a.jsonl", turns({"role": "god", "content": "a"}), "row 2, turn 1 | 'god'"),
    (
        "a role of lists",
        "train",
        "a.jsonl",
        turns({"role": [[1] * 9999], "content": "a"}),
        "row 2, turn 1 | unknown role",
    ),
    (
        "a role that steers",
        "train",
        "a.jsonl",
        turns({"role": "\x1b[2J\u202e", "content": "a"}),
        "row 2, turn 1 | x1b[2J",
    ),
    ("content of an object", "train", "a.jsonl", turns({"role": "user", "content": {"a": 1}}), "row 2, turn 1 | dict"),
    (
        "an image",
        "train",
        "a.jsonl",
        turns({"role": "user", "content": [{"type": "image"}]}),
        "row 2, turn 1 | 'image'",
    ),
    (
        "tool calls",
        "train",
        "a.jsonl",
        turns({"role": "user", "content": "a", "tool_calls": [1]}),
        "turn 1 | tool_calls",
    ),
    ("a weight of text", "train", "a.jsonl", turns({**ANSWER, "weight": "x" * 9999}), "row 2, turn 1 | weight"),
    ("half a surrogate", "train", "a.jsonl", turns({"role": "user", "content": "\ud800"}), "row 2, turn 1 | surrogate"),
    ("no answer", "evaluate", "a.jsonl", turns({"role": "user", "content": "a"}), "row 2 | no assistant turn"),
    ("blank answers", "train", "a.jsonl", turns({"role": "user", "content": "a"}, {**ANSWER, "content": " "}), "row 2"),
    ("a list cut off", "train", "a.json", '[{"text": "a"}, ', "a.json: cannot be read as JSON"),
    ("a list of numbers", "train", "a.json", "[1, 2]", "a.json, row 1 | int"),
    ("a list of 5,000 digits", "train", "a.json", f"[{'9' * 5000}]", "a.json: cannot be read as JSON"),
    ("a nested list", "evaluate", "a.json", "[" * 9000, "a.json: cannot be read as JSON"),
    ("too many fields", "train", "a.csv", "prompt,completion\na,b,c\n", "a.csv | row 1 has more fields"),
    ("a header twice", "train", "a.csv", "prompt,prompt\na,b\n", "a.csv | names 'prompt' twice"),
    ("an open quote", "train", "a.csv", 'prompt,completion\n"a,b\n', "a.csv | cannot be read as CSV"),
    ("Latin-1", "evaluate", "a.csv", b"prompt,completion\n\xe9,b\n", "a.csv | cannot be read as CSV"),
    ("no Parquet", "train", "a.parquet", "PAR1", "a.parquet | cannot be read as PARQUET"),
    (
        "a Parquet of zeros",
        "train",
        "a.parquet",
        b"PAR1" + bytes(100) + b"PAR1",
        "a.parquet | cannot be read as PARQUET",
    ),
    ("a pickle", "train", "a.pkl", b"cos\n_exit\n(I99\ntR.", "a.pkl | .pkl file, expected one of .json"),
    ("a script", "train", "a.py", "raise SystemExit", "a.py | .py file, expected one of .json"),
    ("an archive", "evaluate", "a.tar.gz", b"\x1f\x8b", "a.tar.gz | .gz file, expected one of .json"),
]


@pytest.mark.parametrize(
    ("command", "name", "content", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_file(command, name, content, words, world, capfd):
    text(name, content)(world.root)
    assert words_missing(refusal(reading(world, command, world.root / name), capfd, world.root), words) == []


def reading(world: World, command: str, data: Path | str) -> list[str]:
    return [
        str(data) if part == str(world.chats) else part.replace(f"={world.chats}", f"={data}")
        for part in world.argv(command)
    ]


def _file(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def _disk(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list([GOOD]).save_to_disk(str(folder / "disk"))
    return folder / "disk"


def _state(folder: Path, **changes: object) -> None:
    state = json.loads((_disk(folder) / "state.json").read_text())
    _file(folder / "disk", "state.json", {**state, **changes})


FOLDERS = [
    ("a name nowhere", "train", "no/such/folder/x", lambda root: None, "no/such/folder/x | no such data"),
    ("a name of 5,000 letters", "evaluate", "a" * 5000, lambda root: None, "is not a path that can be read"),
    ("nobody's home", "train", "~nosuchuser/x.jsonl", lambda root: None, "~nosuchuser/x.jsonl"),
    ("an empty folder", "train", "rows", lambda root: (root / "rows").mkdir(), "rows | no data files"),
    (
        "a link out of the folder",
        "train",
        "rows",
        lambda root: ((root / "rows").mkdir(), (root / "rows" / "a.jsonl").symlink_to(root / "chats.jsonl")),
        "a.jsonl | chats.jsonl | out of its folder",
    ),
    ("a pipe", "evaluate", "a.jsonl", pipe("a.jsonl"), "a.jsonl | no such data file"),
    ("a saved folder without rows", "train", "disk", lambda root: _state(root, _data_files=[{}]), "state.json"),
    (
        "a saved folder that leads up",
        "train",
        "disk",
        lambda root: _state(root, _data_files=[{"filename": "../../x.arrow"}]),
        "state.json | ../../x.arrow",
    ),
    ("a saved folder of lists", "train", "disk", lambda root: _state(root, _data_files=7), "disk | save_to_disk"),
    (
        "a saved folder of no rows",
        "evaluate",
        "disk",
        lambda root: [void(file.write_bytes(b"")) for file in _disk(root).glob("*.arrow")],
        "disk | cannot be read as a save_to_disk folder",
    ),
    (
        "splits that lead up",
        "train",
        "disk",
        lambda root: ((root / "disk").mkdir(), _file(root / "disk", "dataset_dict.json", {"splits": ["../train"]})),
        "dataset_dict.json | ../train",
    ),
    (
        "splits of numbers",
        "train",
        "disk",
        lambda root: ((root / "disk").mkdir(), _file(root / "disk", "dataset_dict.json", {"splits": 3})),
        "dataset_dict.json",
    ),
]


@pytest.mark.parametrize(
    ("command", "data", "make", "words"), [case[1:] for case in FOLDERS], ids=[case[0] for case in FOLDERS]
)
def test_folder(command, data, make, words, world, capfd):
    make(world.root)
    assert words_missing(refusal(reading(world, command, data), capfd, world.root), words) == []


PROMPTS = [
    ("no file", "none.txt", None, "none.txt | cannot be read"),
    ("an empty file", "a.txt", "", "a.txt | no prompt"),
    ("bytes", "a.txt", b"\xff", "a.txt | not UTF-8"),
    ("half an object", "a.jsonl", '{"prompt": ', "a.jsonl, line 1 | is not JSON"),
    ("5,000 digits", "a.jsonl", f'{{"prompt": {"9" * 5000}}}', "a.jsonl, line 1 | is not JSON"),
    ("a list", "a.jsonl", "[1]", "a.jsonl, line 1 | found list"),
    ("both kinds", "a.jsonl", '{"prompt": "a", "messages": []}', "a.jsonl, line 1 | either prompt or messages"),
    (
        "nothing asked",
        "a.jsonl",
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        "line 1 | no message to answer",
    ),
    ("an unknown role", "a.jsonl", '{"messages": [{"role": "\\u001b[1m", "content": "a"}]}', "line 1, turn 1 | x1b[1m"),
]


@pytest.mark.parametrize(
    ("name", "content", "words"), [case[1:] for case in PROMPTS], ids=[case[0] for case in PROMPTS]
)
def test_prompts(name, content, words, world, capfd):
    if content is not None:
        text(name, content)(world.root)
    argv = ["generate", "--model", str(world.base), "--prompts", str(world.root / name), "--output", f"{world.out}.txt"]
    assert words_missing(refusal(argv, capfd, world.root), words) == []
