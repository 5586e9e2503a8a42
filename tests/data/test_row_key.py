"""The name of prepared rows: another for whatever makes other rows, the same for all else."""

import dataclasses
from datetime import date

import datasets
import numpy as np
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import row_key
from phi3_jax.data.columnar import Stored
from phi3_jax.data.row_key import NOT_COUNTED, RowKeys
from phi3_jax.data.row_tokenizer import Row
from phi3_jax.data.sources import JsonLines, Source, load_sources
from tests.helpers.tokenizers import APRIL, JULY, phi3_tokenizer

# A value of every setting other than its default. A new setting is missing here until somebody decides, by
# `NOT_COUNTED`, whether rows depend on it.
OTHER = {
    "train": "x.jsonl",
    "eval": "x.jsonl",
    "eval_fraction": 0.5,
    "split": "test",
    "eval_split": "test",
    "dataset_config": "en",
    "format": "messages",
    "columns": {"prompt": "q"},
    "max_length": 7,
    "truncation_mode": "keep_end",
    "packing": False,
    "packing_strategy": "bfd",
    "eval_packing": False,
    "shuffle": False,
    "streaming": True,
    "shuffle_buffer_size": 5,
    "template": "none",
    "loss_on": "last",
    "final_eos": True,
    "literal_roles": [],
    "ignore_keys": ["id"],
    "skip_empty": True,
    "skip_invalid": True,
    "max_rows": 3,
    "cache": False,
}
# Whose effect is in the rows themselves, in their order, or comes after them.
FREE = {"train", "eval", "eval_fraction", "split", "eval_split", "dataset_config", "packing", "shuffle", "max_rows"}
FREE |= {"eval_packing", "streaming", "shuffle_buffer_size", "cache"}
LINES = [b'{"prompt": "a", "completion": "b"}', b'{"prompt": "c", "completion": "d"}']


@pytest.fixture(scope="module")
def tokenizer():
    return phi3_tokenizer(JULY)


def rows_of(rows, name="x.jsonl", numbers=None):
    source = Source(name, rows)
    return [Row(source, number) for number in (range(len(rows)) if numbers is None else numbers)]


def lines(*content):
    return rows_of(JsonLines("x.jsonl", b"\n".join(content)))


def test_every_setting_is_decided(tokenizer):
    defaults = DataSection()
    assert set(OTHER) == {field.name for field in dataclasses.fields(DataSection)}
    assert NOT_COUNTED == FREE
    without = [RowKeys(tokenizer, DataSection(packing=False, packing_strategy=x)) for x in ("bfd", "wrapped")]
    assert without[0](lines(*LINES)) == without[1](lines(*LINES))
    key = RowKeys(tokenizer, defaults)(lines(*LINES))
    assert len(key) == 32
    for name, value in OTHER.items():
        needed = {"streaming": True} if name == "shuffle_buffer_size" else {}
        changed = RowKeys(tokenizer, dataclasses.replace(defaults, **needed, **{name: value}))(lines(*LINES))
        assert (changed == key) == (name in FREE), name


def test_a_byte_of_the_rows_makes_another_and_where_they_lie_does_not(tokenizer, tmp_path, monkeypatch):
    keys = RowKeys(tokenizer, DataSection())
    key = keys(lines(*LINES))
    assert keys(lines(LINES[0], LINES[1].replace(b"d", b"e"))) != key
    assert keys(lines(*LINES[::-1])) != key
    assert keys(lines(*LINES)[:1]) != key
    assert keys(lines(*LINES)[::-1]) != key
    assert keys(rows_of(JsonLines("x.jsonl", b"\n".join(LINES)), "y.jsonl")) != key  # their names are in messages
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        (tmp_path / folder / "x.jsonl").write_bytes(b"\n".join(LINES) + b"\n")
        [source] = load_sources("x.jsonl", split=None)
        assert RowKeys(tokenizer, DataSection())([Row(source, 0), Row(source, 1)]) == key


def test_two_sources_of_one_name_are_two(tokenizer):
    one, other = (rows_of([{"text": text}], "rows") for text in "ab")
    keys = RowKeys(tokenizer, DataSection())
    assert len({keys(one), keys(other), keys(one + other), keys(other + one), keys(one + one)}) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"text": "1"}, {"text": 1}),
        ({"text": True}, {"text": 1}),
        ({"text": [1]}, {"text": (1,)}),
        ({"text": {1: "a"}}, {"text": {"1": "a"}}),
        ({"a": "x", "b": "y"}, {"b": "y", "a": "x"}),
        ({"text": "half \ud800"}, {"text": "half \ud801"}),
    ],
)
def test_objects_count_by_what_they_are(tokenizer, one, other):
    keys = RowKeys(tokenizer, DataSection())
    assert keys(rows_of([one])) == keys(rows_of([dict(one)]))
    assert keys(rows_of([one])) != keys(rows_of([other]))


def test_what_cannot_be_told_has_no_name(tokenizer):
    for value in (np.zeros(3), date(2020, 1, 1), [{"a": {2.5}}], np.str_("b")):
        assert RowKeys(tokenizer, DataSection())(rows_of([{"text": "a"}, {"text": value}])) is None


def test_tables_count_by_their_columns(tokenizer):
    table = datasets.Dataset.from_dict({"text": ["a", "b", None], "n": [[1], [], [2, 3]]})
    keys = RowKeys(tokenizer, DataSection())

    def key(data):
        return keys(rows_of(Stored("x", data)))

    first = key(table)
    assert key(datasets.Dataset.from_list(table.to_list())) == first
    assert key(table.select([2, 1, 0])) == key(table.select([2, 1, 0]))
    others = [
        table.select([2, 1, 0]),
        table.select([1, 0, 2]),
        table.select([0, 1]),
        table.rename_column("n", "m"),
        table.cast_column("n", datasets.List(datasets.Value("int32"))),
        datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [[1], [], [2, 3]]}),
    ]
    assert len({first, *map(key, others)}) == 7


def test_rows_that_a_program_makes_have_no_name(tokenizer):
    table = datasets.Dataset.from_dict({"text": ["a"]}).with_transform(lambda batch: {"text": ["b"]})
    assert RowKeys(tokenizer, DataSection())(rows_of(Stored("x", table))) is None


def test_template_tokens_and_vocabulary_count():
    changed = {"template": phi3_tokenizer(APRIL), "bos": phi3_tokenizer(JULY, add_bos=True)}
    for name in ("the eos token", "a word", "none"):
        changed[name] = phi3_tokenizer(JULY)
    changed["the eos token"].eos_token = "<|end|>"
    changed["a word"].add_tokens(["hen"])
    keys = {name: RowKeys(each, DataSection())(lines(*LINES)) for name, each in changed.items()}
    assert keys["none"] == RowKeys(phi3_tokenizer(JULY), DataSection())(lines(*LINES))
    assert len(set(keys.values())) == 5


def test_a_template_that_writes_the_date_counts_the_date(monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date(2999, 1, 1)

    dated = phi3_tokenizer("{{ strftime_now('%d %b %Y') }}" + JULY)
    plain = phi3_tokenizer(JULY)
    before = [RowKeys(each, DataSection())(lines(*LINES)) for each in (dated, plain)]
    monkeypatch.setattr(row_key, "date", Tomorrow)
    after = [RowKeys(each, DataSection())(lines(*LINES)) for each in (dated, plain)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


@pytest.mark.parametrize("package", ["phi3_jax", "transformers", "tokenizers", "jinja2"])
def test_versions_count(tokenizer, package, monkeypatch):
    before = RowKeys(tokenizer, DataSection())(lines(*LINES))
    real = row_key.package_versions
    monkeypatch.setattr(row_key, "package_versions", lambda *names: {**real(*names), package: "0.0"})
    row_key._versions.cache_clear()
    try:
        assert RowKeys(tokenizer, DataSection())(lines(*LINES)) != before
    finally:
        monkeypatch.undo()
        row_key._versions.cache_clear()
