"""Rows that a program has in memory: what `train_dataset` and `eval_dataset` may be, and how they are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from typing import cast

from phi3_jax.config.sections import EVAL as PREFIX
from phi3_jax.config.sections import EVAL_IN_MEMORY, TRAIN_IN_MEMORY, DataSection
from phi3_jax.data.columnar import Stored, read_iterable
from phi3_jax.data.sources import Source
from phi3_jax.system.errors import InputError

# A `datasets.Dataset` or `IterableDataset`, a list of dictionaries, any other iterable of them such as a generator,
# or a function that gives one.
GivenRows = Iterable[Mapping[str, object]] | Callable[[], Iterable[Mapping[str, object]]]

# The same, or several sets by name.
GivenSets = GivenRows | Mapping[str, GivenRows]

TRAIN, EVAL = "train_dataset", "eval_dataset"
_KINDS = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")


def with_given_rows(data: DataSection, train: GivenRows | None, eval: GivenSets | None) -> DataSection:
    """The section, saying which of its rows are given in memory.

    Raises:
        InputError: Where the section names such rows, too; where it says that rows are in memory and none are given;
            and where there is nothing to train on.

    Example:
        >>> with_given_rows(DataSection(), [{"text": "a"}], None).train
        'train_dataset, in memory'
    """
    if train is not None:
        if data.train not in (None, TRAIN_IN_MEMORY):
            raise InputError(f"{TRAIN} is given beside data.train {data.train}; keep one of them")
        if data.eval_split is not None and data.eval is None and eval is None:
            raise InputError(
                f"data.eval_split is {data.eval_split}, but {TRAIN} has no splits; give {EVAL}, or data.eval"
            )
        data = replace(data, train=TRAIN_IN_MEMORY)
    if eval is not None:
        names = [f"data.{name}" for name in ("eval", "eval_split", "eval_fraction") if getattr(data, name)]
        if names and EVAL_IN_MEMORY not in data.eval_sources.values():
            raise InputError(f"{EVAL} is given beside {' and '.join(names)}; keep one of them")
        data = replace(data, eval=dict.fromkeys(eval, EVAL_IN_MEMORY) if isinstance(eval, Mapping) else EVAL_IN_MEMORY)
    for name, given, is_said in (
        (TRAIN, train, data.train == TRAIN_IN_MEMORY),
        (EVAL, eval, EVAL_IN_MEMORY in data.eval_sources.values()),
    ):
        if given is None and is_said:
            raise InputError(
                f"data.{_key(name)} says that the rows were given in memory; give {name} again, or name a file"
            )
    data.require_train()
    return data


def given_sets(given: GivenSets) -> dict[str, tuple[str, GivenRows]]:
    """Evaluation rows in memory: of each set what stands in front of its figures' names, its name in messages, and it.

    Example:
        >>> rows = [{"text": "a"}]
        >>> given_sets({"chats": rows}) == {"eval_chats": ("eval_dataset['chats']", rows)}
        True
    """
    if isinstance(given, Mapping):
        return {f"{PREFIX}_{name}": (f"{EVAL}[{name!r}]", rows) for name, rows in given.items()}
    return {PREFIX: (EVAL, given)}


def given_source(given: GivenRows, name: str) -> Source:
    """The rows as those of a file, named for messages.

    Raises:
        InputError: As `read_given`.

    Example:
        >>> given_source(({"text": text} for text in "ab"), "train_dataset").rows[1]
        {'text': 'b'}
    """
    return Source(name, _stored(given, name) or list(read_given(given, name)))


def read_given(given: GivenRows, name: str) -> Iterator[Mapping[str, object]]:
    """The rows one after the other; those of a function are asked for anew.

    Raises:
        InputError: For what holds no rows, and for a row that is no dictionary.
    """
    kind = _datasets_kind(given)
    if kind.endswith("DatasetDict"):
        splits = list(cast("Mapping[str, object]", given))
        raise InputError(
            f"{name} is a {kind} with the splits {', '.join(splits)}; pass one of them, "
            f"such as {name}=dataset[{splits[0] if splits else 'train'!r}]"
        )
    if isinstance(given, str | bytes | PathLike):
        raise InputError(f"{name} is {str(given)[:200]!r}, expected rows; name files and hub ids as data.{_key(name)}")
    if isinstance(given, Mapping):
        raise InputError(f"{name} is a {type(given).__name__}, expected rows: a dataset, or dictionaries one by one")
    if kind == "IterableDataset":
        rows = read_iterable(given)
    elif (stored := _stored(given, name)) is not None:
        rows = (stored[index] for index in range(len(stored)))
    else:
        rows = _iterated(given, name)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{name}, row {number}: is a {type(row).__name__}, expected a dictionary with named columns"
            )
        yield row


def gives_once(given: GivenRows) -> bool:
    """Whether the rows cannot be asked for again, as those of a generator."""
    return isinstance(given, Iterator)


def _iterated(given: GivenRows, name: str) -> Iterator[Mapping[str, object]]:
    rows = given() if callable(given) and not hasattr(given, "__iter__") else given
    try:
        return iter(cast("Iterable[Mapping[str, object]]", rows))
    except TypeError as error:
        what = f"gives a {type(rows).__name__}" if rows is not given else f"is a {type(rows).__name__}"
        raise InputError(f"{name} {what}, expected rows: a dataset, or dictionaries one by one") from error


def _stored(given: GivenRows, name: str) -> Stored | None:
    return Stored(name, given) if _datasets_kind(given) == "Dataset" else None


def _datasets_kind(given: object) -> str:
    """The class of the datasets library that this is; empty for all else."""
    for kind in type(given).__mro__:
        if kind.__module__.partition(".")[0] == "datasets" and kind.__name__ in _KINDS:
            return kind.__name__
    return ""


def _key(name: str) -> str:
    return name.partition("_dataset")[0]
