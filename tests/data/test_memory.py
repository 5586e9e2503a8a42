"""Rows that a program has in memory."""

import datasets
import pytest

from phi3_jax.config.sections import DataSection
from phi3_jax.data import prepare_data
from phi3_jax.data.memory import given_source, gives_once, read_given, with_given_rows
from phi3_jax.system.errors import InputError
from tests.helpers.tokenizers import tiny_tokenizer

ROWS = [{"prompt": f"{n} teas", "completion": f"tea x{n}"} for n in range(1, 6)]
CALLS = [{"tool_calls": [{"name": "add", "arguments": {"item": "tea"}}]}, {"tool_calls": [{"arguments": {"n": 2}}]}]


def table(rows=ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


GIVEN = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "function": lambda: lambda: iter(ROWS),
    "Dataset": table,
    "Dataset, formatted": lambda: table().with_format("numpy"),
    "Dataset, selected": lambda: table([*ROWS, {"prompt": "", "completion": ""}]).select(range(5)),
    "Dataset, transformed": lambda: table([{"n": n} for n in range(1, 6)]).with_transform(
        lambda batch: {
            "prompt": [f"{n} teas" for n in batch["n"]],
            "completion": [f"tea x{n}" for n in batch["n"]],
        }
    ),
    "IterableDataset": lambda: table().to_iterable_dataset(),
    "IterableDataset, mapped": lambda: table().to_iterable_dataset().map(lambda row: row),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_rows_of_every_kind_are_prepared_as_those_of_a_file(chats, kind):
    data = chats(*ROWS)
    whole = prepare_data(data, tiny_tokenizer(), seed=0).train
    given = prepare_data(DataSection(max_length=64), tiny_tokenizer(), seed=0, train=GIVEN[kind]()).train
    assert given.input_ids.tolist() == whole.input_ids.tolist()
    assert given.loss_mask.tolist() == whole.loss_mask.tolist()
    assert (given.where(2), given.stats.sources) == ("train_dataset, row 3", ["train_dataset"])


def test_what_a_table_filled_up_with_nulls_is_not_there():
    expected = [{"tool_calls": [{"name": "add", "arguments": {"item": "tea"}}]}, CALLS[1]]
    for given in (table(CALLS), table(CALLS).to_iterable_dataset(), table(CALLS).with_transform(lambda batch: batch)):
        assert list(read_given(given, "train_dataset")) == expected
    # In dictionaries somebody wrote them.
    assert list(read_given([{"a": {"b": None}}], "train_dataset")) == [{"a": {"b": None}}]


def test_media_of_a_stream_stay_closed():
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    image = {"bytes": None, "path": "no/such.png"}
    columns = {"prompt": ["a"], "image": [image]}
    rows = datasets.Dataset(datasets.table.InMemoryTable.from_pydict(columns, schema=features.arrow_schema))
    assert list(read_given(rows.to_iterable_dataset(), "train_dataset")) == [
        {"prompt": "a", "image": {"path": "no/such.png"}}
    ]


def test_evaluation_rows_beside_any_training_rows(chats):
    data = chats(*ROWS)
    prepared = prepare_data(data, tiny_tokenizer(), seed=0, eval=table(ROWS[:2]))
    assert (len(prepared.train), list(prepared.eval_sets)) == (5, ["eval"])
    given = prepared.eval_sets["eval"]
    assert (len(given), given.where(0)) == (2, "eval_dataset, row 1")
    held_out = prepare_data(DataSection(eval_fraction=0.4), tiny_tokenizer(), seed=0, train=ROWS)
    assert (len(held_out.train), len(held_out.eval_sets["eval"])) == (3, 2)
    from_file = prepare_data(DataSection(eval=data.train), tiny_tokenizer(), seed=0, train=iter(ROWS[:1]))
    assert (len(from_file.train), len(from_file.eval_sets["eval"])) == (1, 5)


def test_several_sets_by_name_each_by_itself(chats):
    """A mapping, or the splits of a data set; config.yaml names them, and takes the same again."""
    splits = datasets.DatasetDict(chats=table(ROWS[:2]), code=table(ROWS[2:]))
    for given in ({"chats": ROWS[:2], "code": lambda: iter(ROWS[2:])}, splits):
        prepared = prepare_data(DataSection(), tiny_tokenizer(), seed=0, train=ROWS, eval=given)
        found = {name: (len(rows), rows.where(0)) for name, rows in prepared.eval_sets.items()}
        assert found == {
            "eval_chats": (2, "eval_dataset['chats'], row 1"),
            "eval_code": (3, "eval_dataset['code'], row 1"),
        }
        said = with_given_rows(DataSection(), ROWS, given)
        assert said.eval == {"chats": "eval_dataset, in memory", "code": "eval_dataset, in memory"}
        assert with_given_rows(said, ROWS, given) == said
        with pytest.raises(InputError, match="data.eval says that the rows were given in memory"):
            with_given_rows(said, ROWS, None)
    file = chats(*ROWS).train
    prepared = prepare_data(DataSection(train=file, eval={"same": file, "again": file}), tiny_tokenizer(), seed=0)
    assert list(prepared.stats) == ["train", "eval_same", "eval_again"]
    with pytest.raises(InputError, match=r"eval_dataset\['a'\], row 1: is a str.*named columns"):
        prepare_data(DataSection(), tiny_tokenizer(), seed=0, train=ROWS, eval={"a": ["text"]})
    with pytest.raises(InputError, match="data.eval is {}, expected a source"):
        prepare_data(DataSection(), tiny_tokenizer(), seed=0, train=ROWS, eval={})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (datasets.DatasetDict(train=table(), test=table()), r"DatasetDict .* train, test.*dataset\['train'\]"),
        (datasets.IterableDatasetDict(a=table().to_iterable_dataset()), r"an? IterableDatasetDict.*dataset\['a'\]"),
        ("chats.jsonl", "train_dataset is 'chats.jsonl', expected rows; name files and hub ids as data.train"),
        ({"prompt": ["a"], "completion": ["b"]}, "train_dataset is a dict, expected rows"),
        (3, "train_dataset is a int, expected rows"),
        (lambda: 3, "train_dataset gives a int, expected rows"),
        ([ROWS[0], ROWS[1], "tea"], "train_dataset, row 3: is a str, expected a dictionary"),
        ([ROWS[0], {"prompt": 1.5, "answer": ""}], "train_dataset, row 2: the columns prompt, answer fit no format"),
        ([], "train_dataset: no usable rows"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare_data(DataSection(), tiny_tokenizer(), seed=0, train=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ({"train": "a.jsonl"}, {"train": ROWS}, "train_dataset is given beside data.train a.jsonl; keep one"),
        ({"eval": "a.jsonl"}, {"train": ROWS, "eval": ROWS}, "eval_dataset is given beside data.eval; keep one"),
        ({"eval_fraction": 0.1}, {"train": ROWS, "eval": ROWS}, "eval_dataset is given beside data.eval_fraction"),
        ({"eval_split": "test"}, {"train": ROWS}, "data.eval_split is test, but train_dataset has no splits"),
        ({}, {}, "data.train is not set"),
        ({"train": "train_dataset, in memory"}, {}, "data.train says that the rows were given in memory; give"),
        ({"train": "a", "eval": "eval_dataset, in memory"}, {}, "data.eval says that the rows were given in memory"),
    ],
)
def test_rows_are_named_in_one_place(data, given, message):
    with pytest.raises(InputError, match=message):
        with_given_rows(DataSection(**data), given.get("train"), given.get("eval"))


def test_a_written_configuration_takes_the_same_rows_again():
    data = with_given_rows(DataSection(), ROWS, ROWS)
    assert with_given_rows(data, ROWS, ROWS) == data
    assert data.has_eval


def test_generators_give_their_rows_once():
    assert gives_once(row for row in ROWS)
    assert not any(gives_once(GIVEN[kind]()) for kind in GIVEN if kind != "generator")
    assert list(given_source(iter(ROWS), "train_dataset").rows) == ROWS
