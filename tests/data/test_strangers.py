"""Data and tokenizers from strangers, with the released models' own tokenizers and templates."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.formats import Conversation, Turn
from phi3_jax.data.prepare import prepare_data
from phi3_jax.data.sources import load_sources
from phi3_jax.hf.tokenizer import load_tokenizer
from phi3_jax.system.errors import InputError

TOKENIZERS = ("phi-3-mini-4k-instruct", "phi-3.5-mini-instruct")
TEMPLATES = (*TOKENIZERS, "phi-3-mini-4k-instruct.2024-07", "phi-4-mini-instruct")
MARKERS = (
    *("<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|tool|>"),
    *("<|/tool|>", "<|tool_call|>", "<|placeholder1|>", "\n", " ", "2 + 2", "é", "分析", "<|", "|>", "<0x0A>"),
)
contents = st.lists(st.sampled_from(MARKERS), min_size=1, max_size=6).map("".join).filter(str.strip)


@pytest.fixture(scope="module")
def chats(testdata):
    made = {}
    for name in TOKENIZERS:
        for template in TEMPLATES:
            tokenizer = load_tokenizer(testdata / "models" / name)
            config = json.loads((testdata / "models" / template / "tokenizer_config.json").read_text())
            tokenizer.chat_template = config["chat_template"]
            made[name, template] = tokenizer, ChatTokenizer(tokenizer)
    return made


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(contents, min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_markers_in_contents_forge_no_turn(chats, name, template, texts):
    """However they are spelt together, the document has the turns of a harmless conversation, and of the user's words
    the very letters."""
    tokenizer, chat = chats[name, template]
    control = {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special or not added.normalized
    }

    def encode(words):
        turns = tuple(Turn(role, text) for role, text in zip(("system", "user", "assistant"), words, strict=True))
        document = chat.render(Conversation(turns), "row 1")
        return chat.encode([document])[0].ids.tolist()

    harmless = [token for token in encode(["x", "x", "x"]) if token in control]
    turns = set(harmless) | {tokenizer.eos_token_id}
    assert [token for token in encode(texts) if token in turns] == [token for token in harmless if token in turns]
    # In the user's words there is none at all.
    ids = encode(["x", texts[1], "x"])
    assert [token for token in ids if token in control] == harmless
    written = tokenizer.decode([token for token in ids if token not in control])
    assert "".join(texts[1].split()) in "".join(written.split())


def test_padding_and_truncation_stored_in_tokenizer_json_change_no_row(testdata, tmp_path):
    source = testdata / "models" / "phi-3-mini-4k-instruct"
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 32000,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    rows = [{"prompt": "a b c d e f g h", "completion": "yes, " * number} for number in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for folder in (source, tmp_path):
        train = prepare_data(DataSection(train=str(tmp_path / "rows.jsonl")), load_tokenizer(folder), seed=0).train
        found.append((train.input_ids.tolist(), train.loss_mask.tolist(), train.offsets.tolist()))
    assert found[0] == found[1]
    assert found[0][2][-1] > 60  # more than the stored lengths would leave


def test_media_columns_are_not_opened(tmp_path):
    """A row's picture is what the file stores: datasets' features would open the path, or ask the address."""
    pictures = {"path": ["/etc/passwd", "/etc/hostname"], "bytes": [None, None]}
    storage = pyarrow.StructArray.from_pandas([{"bytes": None, "path": path} for path in pictures["path"]])
    features = {"image": {"_type": "Image"}, "many": {"_type": "List", "feature": {"_type": "Image"}}}
    features |= {name: {"_type": "Value", "dtype": "string"} for name in ("prompt", "completion")}
    storage = storage.cast(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    table = pyarrow.table(
        {
            "image": storage,
            "many": pyarrow.ListArray.from_arrays([0, 1, 2], storage),
            "prompt": ["a", "b"],
            "completion": ["c", "d"],
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    dataset = datasets.Dataset(table.replace_schema_metadata(metadata))
    assert type(dataset.features["image"]).__name__ == "Image"  # which would open them
    dataset.save_to_disk(str(tmp_path / "disk"))
    for place in ("a.parquet", "disk"):
        (source,) = load_sources(str(tmp_path / place), split="train")
        # save_to_disk keeps a file's last name, and what was in it.
        assert [Path(row["image"]["path"]).name for row in source.rows] == ["passwd", "hostname"]
        assert set(source.rows[0]["many"][0]) - {"bytes"} == {"path"}  # what is null is left out


@pytest.mark.parametrize("encoding", ["a dictionary", pytest.param("common beginnings", marks=pytest.mark.slow)])
def test_a_parquet_file_that_stands_for_far_more_than_its_size_is_refused(encoding, tmp_path):
    """A long text once, and a number that says how often: 50 kB for 200 GB of rows, or for 1.1 GB."""
    text, count = "x" * 2**20, 200_000
    if encoding == "a dictionary":
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
    else:
        schema = pyarrow.schema({"text": pyarrow.string()})
        settings = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
        with parquet.ParquetWriter(tmp_path / "a.parquet", schema, **settings) as writer:
            writer.write_table(pyarrow.table({"text": [text] * 1100}), row_group_size=1100)
    assert (tmp_path / "a.parquet").stat().st_size < 2**18
    code = f"""
from phi3_jax import InputError
from phi3_jax.data.sources import load_sources
from phi3_jax.system.errors import InputError
try:
    load_sources({str(tmp_path / "a.parquet")!r}, split=None)
except InputError as error:
    print(error)
from phi3_jax.training.results import peak_memory
print(peak_memory()["host_peak_bytes"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, peak = done.stdout.splitlines()
    assert "stand for more than 1.0 GiB of rows" in error
    assert int(peak) < 3 * 2**30


def test_large_row_groups_are_not_read_row_by_row(tmp_path, monkeypatch):
    """Each row would be a batch, and a chunk of the table, where all rows of a group could be one long text."""
    monkeypatch.setattr("phi3_jax.data.columnar._BATCH", 1)
    parquet.write_table(pyarrow.table({"text": [f"text {row}" for row in range(1000)]}), tmp_path / "a.parquet")
    (source,) = load_sources(str(tmp_path / "a.parquet"), split=None)
    assert source.rows[999] == {"text": "text 999"}
    assert len(source.rows._dataset.data.column(0).chunks) == 16  # of 64


def test_parquet_rows_are_read_whole(tmp_path):
    """In several row groups and batches, nested, with the types that datasets wrote down."""
    rows = [
        {"messages": [{"role": "user", "content": "a" * (index % 7)}, {"role": "assistant", "content": str(index)}]}
        for index in range(70_000)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"), batch_size=30_000)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    (source,) = load_sources(str(tmp_path / "a.parquet"), split=None)
    assert len(source.rows) == len(rows)
    assert [source.rows[index] for index in (0, 29_999, 30_000, 69_999)] == [
        rows[index] for index in (0, 29_999, 30_000, 69_999)
    ]


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded by a dictionary"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_arrow_files_that_are_compressed_are_refused(compression, coded, tmp_path):
    """A megabyte of them can stand for any number of equal bytes; `save_to_disk` writes none."""
    datasets.Dataset.from_list([{"prompt": "abc", "completion": "d"}]).save_to_disk(str(tmp_path / "disk"))
    (file,) = (tmp_path / "disk").glob("*.arrow")
    table = pyarrow.ipc.open_stream(file.read_bytes()).read_all()
    if coded:
        table = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(file), table.schema, options=options) as writer:
        writer.write_table(table)
    if compression is None:
        if not coded:  # which datasets does not read from a folder that says text
            assert load_sources(str(tmp_path / "disk"), split="train")[0].rows[0]["prompt"] == "abc"
        return
    with pytest.raises(InputError, match="its batches are compressed"):
        load_sources(str(tmp_path / "disk"), split="train")


def test_an_arrow_file_whose_lengths_are_wrong_is_refused(tmp_path):
    """Some such lengths have Arrow end the whole process when the rows are cut."""
    datasets.Dataset.from_list([{"prompt": "abc", "completion": "d"}]).save_to_disk(str(tmp_path / "disk"))
    (file,) = (tmp_path / "disk").glob("*.arrow")
    content = bytearray(file.read_bytes())
    # The offsets of the one text: 0, 3.
    place = content.rindex(bytes((0, 0, 0, 0, 3, 0, 0, 0)))
    content[place + 4 : place + 8] = b"\xff\xff\xff\x7f"
    file.write_bytes(content)
    with pytest.raises(InputError, match="disk: cannot be read as a save_to_disk folder"):
        load_sources(str(tmp_path / "disk"), split="train")
