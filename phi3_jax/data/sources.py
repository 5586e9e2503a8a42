"""From a path or a hub id to rows: dictionaries of columns, each with the name of where it stands.

JSON and CSV are read with the standard library and not with datasets' loaders, which guess types:
answers that look like dates come back as timestamps and `007` as `7.0`, so that a model would be
trained on text that is not in the file. Parquet, Arrow, `save_to_disk` folders and the hub state their
types and go through datasets (`columnar`).
"""

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from phi3_jax.config.hub_options import is_hub_id
from phi3_jax.data.columnar import Stored, check_arrow, read_arrow, read_parquet
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import check_inside, local_path, read_json
from phi3_jax.system.text import first_line, shown

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv")
_PLAIN = re.compile(r"\w[\w.-]*")
# Words in a file's name that say which split it holds, as datasets reads them.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_EVAL_SPLITS = ("validation", "test", "eval", "dev")


class Rows(Protocol):
    """Dictionaries of columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


@runtime_checkable
class WithContent(Protocol):
    """Rows that tell what they hold faster than one after the other."""

    def content(self) -> Iterator[bytes]:
        """Bytes that are others where any row is another. Raises `ValueError` where there are none."""
        ...


@dataclass(frozen=True)
class Source:
    """Rows of one file or of one split, and its name."""

    name: str
    rows: Rows

    def where(self, index: int) -> str:
        """How error messages name a row, counting from 1."""
        return f"{self.name}, row {index + 1}"


class JsonLines:
    """One JSON object a line, parsed when asked for: the bytes take a fraction of the objects' memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self._name = name
        self._lines = [line for line in content.splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, object]:
        return parse_line(self._lines[index], f"{self._name}, row {index + 1}")

    def content(self) -> Iterator[bytes]:
        """The lines."""
        return iter(self._lines)


class _TwiceError(ValueError):
    """An object that has a key twice, of which JSON's reader would keep the last in silence."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice; leave one out")
    return found


def parse_line(line: bytes, where: str) -> Mapping[str, object]:
    """The object in a line of JSON. Raises `InputError` where there is none."""
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except _TwiceError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()):
            reason = "its line ends before the object does"
        raise InputError(f"{where}: is not JSON ({reason}); expected one object a line, or one list") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a JSON {type(row).__name__}, expected an object with named columns")
    return row


def load_sources(path_or_hub_id: str, *, split: str | None, dataset_config: str | None = None) -> list[Source]:
    """Opens a data file, a folder of them, a `save_to_disk` folder or a hub dataset.

    Args:
        path_or_hub_id: A `.json`, `.jsonl`, `.parquet`, `.arrow` or `.csv` file; a folder of such files (where file
            names speak of splits, only those of the split are read); a folder that datasets' `save_to_disk` wrote;
            else an id on the hub.
        split: The one wanted of those that the source has; None takes the only one, or one that is meant for
            evaluation.
        dataset_config: Configuration (subset) of a hub dataset that has several.

    Raises:
        InputError: For what does not exist, cannot be read, or has no such split.
    """
    path = local_path(path_or_hub_id)
    if path.is_file():
        return [read_file(path, str(path_or_hub_id))]
    if is_saved_folder(path):
        return [_load_from_disk(path, split)]
    if path.is_dir():
        return [read_file(file, str(file)) for file in folder_files(path, split)]
    check_hub_id(path_or_hub_id)
    name, dataset = open_on_hub(path_or_hub_id, split, dataset_config)
    return [Source(name, Stored(name, dataset))]


def is_saved_folder(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def check_hub_id(name: str) -> None:
    """Raises `InputError` where a name that is no path here is none of the hub's either."""
    if Path(name).suffix.lower() in SUFFIXES or not is_hub_id(name):
        raise InputError(f"{name}: no such data file or folder; check the path")


def read_file(path: Path, name: str) -> Source:
    """The rows of a file, under that name. Raises `InputError` where it cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".jsonl"):
            return Source(name, _read_json(path, name))
        if suffix == ".csv":
            return Source(name, list(csv_rows(path)))
        if suffix == ".arrow":
            return Source(name, Stored(name, read_arrow(path)))
        if suffix == ".parquet":
            return Source(name, Stored(name, read_parquet(path)))
    except InputError:
        raise
    # pyarrow raises whatever it meets first in a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{name}: cannot be read ({error.strerror}); see to the file") from error
        raise InputError(f"{name}: cannot be read as {suffix[1:].upper()} ({first_line(error)})") from error
    raise InputError(f"{name}: is a {suffix or 'nameless'} file, expected one of {', '.join(SUFFIXES)}")


def _read_json(path: Path, name: str) -> Rows:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        return JsonLines(name, content)
    try:
        rows: list[Mapping[str, object]] = json.loads(content, object_pairs_hook=_object)
    except _TwiceError as error:
        raise InputError(f"{name}: an object in it {error}") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{name}, row {index + 1}: is a JSON {type(row).__name__}, expected an object")
    return rows


def csv_rows(path: Path) -> Iterator[Mapping[str, object]]:
    """The rows of a CSV file, one after the other. Raises `ValueError` where they do not fit their header."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise, less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = list(reader.fieldnames or ())
        if twice := [column for column in names if names.count(column) > 1]:
            raise ValueError(f"the header names {twice[0]!r} twice")
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(f"row {number} has more fields than the header; quote fields that hold commas")
            yield row


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder, those of the split where their names speak of splits, in order."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.name != "dataset_infos.json"
    )
    if not files:
        raise InputError(f"{folder}: no data files in this folder; expected {', '.join(SUFFIXES)}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        for name, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                by_split.setdefault(name, []).append(file)
                break
    if by_split:
        files = by_split[_choose_split(list(by_split), split, str(folder))]
    for file in files:
        check_inside(file)
    return files


def _load_from_disk(folder: Path, split: str | None) -> Source:
    name, part = str(folder), folder
    if (folder / "dataset_dict.json").is_file():
        splits = _names_beside(read_json(folder / "dataset_dict.json").get("splits"), folder / "dataset_dict.json")
        chosen = _choose_split(splits, split, str(folder))
        name, part = f"{folder}[{chosen}]", folder / chosen
    import datasets

    try:
        state, info = part / "state.json", part / "dataset_info.json"
        files = [file.get("filename") for file in read_json(state).get("_data_files", ())]
        for file in _names_beside(files, state):
            check_arrow(part / file)
        read_json(info)
        return Source(name, Stored(name, datasets.load_from_disk(str(part))))
    except Exception as error:  # a damaged folder raises whatever its reader meets first
        raise InputError(f"{part}: cannot be read as a save_to_disk folder ({first_line(error)})") from error


def _names_beside(names: object, where: Path) -> list[str]:
    """Plain names of what lies beside the file at `where`, which must not lead out of its folder."""
    if not isinstance(names, list) or not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in names):
        raise InputError(f"{where}: names {shown(names)}, expected names of what lies beside it; save it again")
    return names


def open_on_hub(
    hub_id: str, split: str | None, dataset_config: str | None, *, streaming: bool = False
) -> "tuple[str, datasets.Dataset]":
    """A split of a hub dataset with its name; an `IterableDataset` where it is to be streamed."""
    import datasets

    try:
        name = _choose_split(datasets.get_dataset_split_names(hub_id, dataset_config), split, hub_id)
        options = {"streaming": True} if streaming else {}
        return f"{hub_id}[{name}]", datasets.load_dataset(hub_id, dataset_config, split=name, **options)
    except InputError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"{hub_id}: no such file or folder here, and no dataset on the hub that you may read; "
            "check the name, or log in (`hf auth login`) if it is private"
        ) from error
    except ValueError as error:
        if "onfig" in str(error):
            choices = " ".join(str(error).split())  # the names stand on a later line
            raise InputError(f"{hub_id}: {choices} Set data.dataset_config.") from error
        raise InputError(f"{hub_id}: cannot be read ({first_line(error)})") from error
    # The network client's own errors differ from one release of huggingface_hub to the next.
    except Exception as error:
        raise InputError(
            f"{hub_id}: no such file or folder here, and the hub did not give it ({first_line(error)})"
        ) from error


def _choose_split(available: list[str], wanted: str | None, name: str) -> str:
    if wanted in available:
        return str(wanted)
    if wanted is None:
        candidates = available if len(available) == 1 else [s for s in _EVAL_SPLITS if s in available]
        if candidates:
            return candidates[0]
    raise InputError(
        f"{name}: has the splits {', '.join(available)}, "
        + (f"not {wanted!r}; set data.split" if wanted else "none of them plainly for evaluation; set data.eval_split")
    )
