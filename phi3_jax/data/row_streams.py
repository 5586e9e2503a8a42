"""Rows of a source one after the other, however many there are: only those that are looked at are in memory.

A row that is held is kept as it was read, the line of a JSON file unparsed, until it is asked for.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from phi3_jax.config.sections import DataSection
from phi3_jax.data.columnar import read_iterable, stream_parquet
from phi3_jax.data.memory import TRAIN, GivenRows, gives_once, read_given
from phi3_jax.data.row_tokenizer import Row
from phi3_jax.data.sources import (
    Source,
    check_hub_id,
    csv_rows,
    folder_files,
    is_saved_folder,
    load_sources,
    open_on_hub,
    parse_line,
    read_file,
)
from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import check_file, local_path
from phi3_jax.system.text import first_line

# A row as it was read: a line of JSON, or columns.
Content = bytes | Mapping[str, object]


class StreamedRow(NamedTuple):
    """A row in memory.

    Attributes:
        number: Its place in the whole stream, from 0.
        row: What is tokenised.
        content: What was read.
    """

    number: int
    row: Row
    content: Content

    @property
    def digest(self) -> bytes:
        """Bytes that are others where the row is another."""
        if isinstance(self.content, bytes):
            return self.content
        return json.dumps(self.content, default=lambda value: type(value).__name__, skipkeys=True).encode()


@dataclass(frozen=True)
class Part:
    """A file of a stream, or a split, by its name; `read` begins anew each time."""

    name: str
    read: Callable[[], Iterator[Content]]


class RowStream(Iterable[StreamedRow]):
    """The rows of some parts; iterating begins anew.

    Args:
        parts: In order.
        once: Whether the rows can be had only once, as those of a generator.
        limit: Only the first so many rows; None for all.

    Attributes:
        names: Of the parts.
        once: As given.
    """

    def __init__(self, parts: Sequence[Part], *, once: bool = False, limit: int | None = None) -> None:
        self.names = [part.name for part in parts]
        self.once, self._parts, self._limit = once, parts, limit
        self._source: Iterator[StreamedRow] | None = self._read() if once else None

    def __iter__(self) -> Iterator[StreamedRow]:
        if self.once:
            rows, self._source = self._source, iter(())
            return rows or iter(())
        return self._read()

    def first(self, count: int) -> list[StreamedRow]:
        """The first rows, which come again all the same."""
        rows = iter(self)
        found = list(islice(rows, count))
        if self.once:
            self._source = chain(found, rows)
        return found

    def _read(self) -> Iterator[StreamedRow]:
        rows = ((part.name, index, content) for part in self._parts for index, content in enumerate(_readable(part)))
        for number, (name, index, content) in enumerate(islice(rows, self._limit)):
            yield StreamedRow(number, Row(Source(name, _Single(name, content)), index), content)


class _Single:
    """The rows of a source, of which one is in memory."""

    def __init__(self, name: str, content: Content) -> None:
        self._name, self._content = name, content

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Mapping[str, object]:
        if isinstance(self._content, bytes):
            return parse_line(self._content, f"{self._name}, row {index + 1}")
        return self._content


def _readable(part: Part) -> Iterator[Content]:
    try:
        yield from part.read()
    except (InputError, MemoryError):
        raise
    # What reads a file raises whatever it meets first in a damaged one, and what reads from a hub its client's errors.
    except Exception as error:
        if part.name == TRAIN:  # which is the caller's program
            raise
        raise InputError(f"{part.name}: cannot be read any further ({first_line(error)})") from error


def open_stream(data: DataSection, given: GivenRows | None = None) -> RowStream:
    """The training rows of a section, or those that are given in memory.

    Raises:
        InputError: For what does not exist, and what cannot be read row by row.

    Example:
        >>> stream = open_stream(DataSection(), lambda: ({"text": text} for text in "ab"))
        >>> [row.row.columns for row in stream], [row.number for row in stream]
        ([{'text': 'a'}, {'text': 'b'}], [0, 1])
    """
    if given is not None:
        part = Part(TRAIN, lambda: read_given(given, TRAIN))
        return RowStream([part], once=gives_once(given), limit=data.max_rows)
    name = data.require_train()
    path = local_path(name)
    if path.is_file():
        parts = [_file_part(path, name)]
    elif is_saved_folder(path):
        parts = [_stored_part(source) for source in load_sources(name, split=data.split)]
    elif path.is_dir():
        parts = [_file_part(file, str(file)) for file in folder_files(path, data.split)]
    else:
        check_hub_id(name)
        where, dataset = open_on_hub(name, data.split, data.dataset_config, streaming=True)
        parts = [Part(where, lambda: read_iterable(dataset))]
    return RowStream(parts, limit=data.max_rows)


def _file_part(path: Path, name: str) -> Part:
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        return Part(name, lambda: _lines(path, name))
    if suffix == ".csv":
        return Part(name, lambda: csv_rows(path))
    if suffix == ".parquet":
        return Part(name, lambda: stream_parquet(path, name))
    return _stored_part(read_file(path, name))  # memory-mapped, or refused


def _stored_part(source: Source) -> Part:
    return Part(source.name, lambda: (source.rows[index] for index in range(len(source.rows))))


def _lines(path: Path, name: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        lines = (line.strip() for line in file)
        for number, line in enumerate(filter(None, lines)):
            text = line if number else line.removeprefix(b"\xef\xbb\xbf")
            if not number and text.startswith(b"["):
                raise InputError(
                    f"{name}: is one list, which cannot be read row by row; write one object a line, or leave "
                    "data.streaming out"
                )
            yield text
