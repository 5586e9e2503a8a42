"""Tables that datasets wrote, read as the rows that they were made of."""

import json

import datasets
import pyarrow
import pytest
from datasets import Features, List, Value
from pyarrow import feather

from phi3_jax.config.sections import DataSection
from phi3_jax.data import prepare_data
from phi3_jax.data.columnar import Stored, plain_row
from phi3_jax.data.formats import read_row
from phi3_jax.data.sources import load_sources
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import CHATML_TOKENS, bytes_tokenizer
from tests.helpers.tool_templates import UNMARKED_TOOLS

CALLS = [
    {"type": "function", "function": {"name": "add", "arguments": {"item": "tea", "count": 2}}},
    {"type": "function", "function": {"name": "pay", "arguments": {"card": "x"}}},
]
ASKS, CALLING = {"role": "user", "content": "2 teas"}, {"role": "assistant", "content": "", "tool_calls": CALLS}
TOOLS = [{"name": "add", "parameters": {"item": {"type": "string"}}}, {"name": "pay", "strict": True}]
# Rows of two formats, with keys that others lack.
ROWS = [
    {"messages": [ASKS, CALLING, {"role": "tool", "content": "ok", "name": "add"}], "tools": TOOLS},
    {"prompt": "3 teas", "completion": "tea x3"},
    {"messages": [ASKS, {"role": "assistant", "content": "tea x2"}]},
]
COLUMNS = ("messages", "tools", "prompt", "completion")


def table(rows=ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row.get(name) for name in COLUMNS} for row in rows])


def written(folder, kind: str) -> str:
    """The rows in a file or folder of that kind, as datasets or Arrow writes it."""
    path, arrow = folder / kind, table().data.table
    if kind == "a.parquet":
        table().to_parquet(str(path))
    elif kind == "disk":
        table().save_to_disk(str(path))
    else:
        new = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, new(file, arrow.schema) as writer:
            writer.write_table(arrow)
    return str(path)


@pytest.mark.parametrize("kind", ["a.parquet", "disk", "stream.arrow", "file.arrow"])
def test_rows_are_those_that_were_written(tmp_path, kind):
    [source] = load_sources(written(tmp_path, kind), split=None)
    assert [{k: v for k, v in row.items() if v is not None} for row in map(source.rows.__getitem__, range(3))] == ROWS
    # Each row is read by its own format; the columns of the others, which are null in it, do not count.
    assert [turn.role for turn in read_row(source.rows[1], "row 2").turns] == ["user", "assistant"]
    assert [turn.role for turn in read_row(source.rows[2], "row 3").turns] == ["user", "assistant"]


def test_tool_rows_of_a_table_have_the_ids_of_those_of_a_json_file(tmp_path):
    """Calls with other arguments, null content, a schema's keys, reasoning, no tools at all."""
    schema = {"type": "object", "properties": {"item": {"type": "string"}, "count": {"enum": [1, 2]}}, "required": []}
    tools = [
        {"type": "function", "function": {"name": "add", "description": "adds", "parameters": schema}},
        {"type": "function", "function": {"name": "pay", "parameters": {"type": "object", "properties": {}}}},
    ]
    answer = {"role": "assistant", "content": "done", "reasoning_content": "both are in"}
    calling = {**CALLING, "content": None}
    rows = [
        {"messages": [ASKS, calling, {"role": "tool", "content": "ok", "tool_call_id": "1"}, answer], "tools": tools},
        {"messages": [{"role": "system", "content": "briefly"}, ASKS, {**answer, "reasoning_content": None}]},
        {"messages": [ASKS, {"role": "assistant", "content": "tea x2"}], "tools": tools[1:]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table(rows).to_parquet(str(tmp_path / "a.parquet"))
    tokenizer = bytes_tokenizer(UNMARKED_TOOLS, CHATML_TOKENS)
    found = [
        prepare_data(DataSection(train=str(tmp_path / name), cache=False), tokenizer, seed=0).train
        for name in ("a.jsonl", "a.parquet")
    ]
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()
    assert found[0].loss_mask.tolist() == found[1].loss_mask.tolist()


def test_a_column_that_is_null_in_a_row_may_be_named_all_the_same():
    columns = {"instruction": "ask", "output": "answer", "input": "context"}
    row = {"ask": "2 + 2?", "context": None, "answer": "4"}
    assert [turn.content for turn in read_row(row, "row 1", columns=columns).turns] == ["2 + 2?", "4"]
    with pytest.raises(InputError, match=r"row 1: data.columns wants 'context' as input, but"):
        read_row({"ask": "2 + 2?", "answer": "4"}, "row 1", columns=columns)


def test_a_struct_of_lists_is_a_list_of_structs(tmp_path):
    """What datasets' `Sequence` of an object makes, here in a file."""
    call = {"function": List({"name": Value("string"), "arguments": Value("string")})}
    turn = {"role": List(Value("string")), "content": List(Value("string")), "tool_calls": List(call)}
    tools = {"name": List(Value("string")), "enum": List(List(Value("string")))}
    features = Features({"chat": turn, "tools": tools, "answers": {"text": List(Value("string"))}})
    calls = {"function": [{"name": "add", "arguments": "{}"}]}
    row = {
        "chat": {"role": ["user", "assistant"], "content": ["2 teas", None], "tool_calls": [None, calls]},
        "tools": {"name": ["add", "pay"], "enum": [["tea"], None]},
        "answers": {"text": ["a", "b"]},
    }
    datasets.Dataset.from_list([row], features=features).to_parquet(str(tmp_path / "a.parquet"))
    [source] = load_sources(str(tmp_path / "a.parquet"), split=None)
    assert source.rows[0] == {
        "chat": [ASKS, {"role": "assistant", "tool_calls": [{"function": calls["function"][0]}]}],
        "tools": [{"name": "add", "enum": ["tea"]}, {"name": "pay"}],
        "answers": {"text": ["a", "b"]},  # neither turns nor tools
    }


def test_objects_that_happen_to_hold_lists_stay():
    """A tool's parameters, and lists that do not belong together."""
    parameters = {"properties": {"content": {"type": ["string", "null"]}, "tool_calls": {"enum": ["a"]}}}
    row = {"tools": [{"name": "add", "parameters": parameters}], "chat_template_kwargs": {"tools": ["a"]}}
    assert plain_row(row) == row
    assert plain_row({"messages": {"role": ["user"], "content": []}}) == {"messages": {"role": ["user"], "content": []}}
    assert plain_row({"messages": {"role": [], "content": []}}) == {"messages": []}


def test_json_columns_hold_what_was_written_nulls_included():
    json = getattr(datasets, "Json", None)
    if json is None:
        pytest.skip("this version of datasets has no Json type")
    features = Features({"tools": List(json()), "messages": List({"role": Value("string"), "call": json()})})
    row = {
        "tools": [{"a": None}, {"b": [None]}],
        "messages": [{"role": "user", "call": None}, {"role": "x", "call": {"a": None}}],
    }
    stored = Stored("rows", datasets.Dataset.from_list([row], features=features))[0]
    assert stored == {"tools": row["tools"], "messages": [{"role": "user"}, row["messages"][1]]}


def test_a_dataset_of_the_callers_is_left_as_it_is():
    """Its features and its format."""
    features = Features({"prompt": Value("string"), "image": datasets.Image()})
    image = {"bytes": None, "path": "no/such.png"}
    arrow = pyarrow.Table.from_pylist([{"prompt": "a", "image": image}], schema=features.arrow_schema)
    rows = datasets.Dataset(arrow)
    assert Stored("rows", rows.with_format("numpy", dtype="int32"))[0] == {
        "prompt": "a",
        "image": {"path": "no/such.png"},
    }
    assert rows.features["image"].decode


@pytest.mark.parametrize(
    ("compressed", "message"), [(True, "batches are compressed"), (False, "cannot be read as ARROW")]
)
def test_arrow_files_that_are_not_read(tmp_path, compressed, message):
    path = tmp_path / "a.arrow"
    feather.write_feather(table().data.table, str(path), compression="lz4" if compressed else "uncompressed")
    if not compressed:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=message) as caught:
        load_sources(str(path), split=None)
    assert "\n" not in str(caught.value)
