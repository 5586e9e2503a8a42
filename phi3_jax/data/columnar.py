"""Tables of Parquet and Arrow files and of datasets, as rows that look like those they were written from.

A column has one type. So a key that one row's turn, tool or call has is there in all of them, null where no
row held it; and a list of objects may lie there as an object of lists. Both are undone here, so that a row
is read in the same way from whatever file it comes:

    {"messages": {"role": ["user", "tool"], "content": ["2 teas", "ok"], "name": [None, "till"]}}
    {"messages": [{"role": "user", "content": "2 teas"}, {"role": "tool", "content": "ok", "name": "till"}]}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_jax.system.compat import is_compressed
from phi3_jax.system.errors import InputError
from phi3_jax.system.memory import free_memory
from phi3_jax.system.reading import check_file
from phi3_jax.system.text import first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from pyarrow import parquet

# Bytes of a batch of Parquet rows, at most about so many; and rows, however long they could be, where memory allows.
_BATCH, _FEW = 2**28, 64
_STREAMED, _BUFFER = 1000, 2**20  # rows of a batch of which only the rows are kept, and bytes read at once
_PIECE = 1000  # rows whose content is looked at together
# Columns that are lists of objects, and the same in a turn; and keys that tell a turn, whatever the column is called.
_LISTS, _LISTS_OF_TURN, _ROLES = {"tools", "functions", "documents"}, ("tool_calls", "content"), ("role", "from")
_MAGIC = b"ARROW1\0\0"


class Stored:
    """Rows of a datasets table, read when asked for.

    Images, audio and the like stay what is stored: datasets would open any file or address that a row names.
    What a transform set with `with_transform` makes of a row is taken; other formats are left out.
    """

    def __init__(self, name: str, dataset: "datasets.Dataset") -> None:
        self._name = name
        transform = dataset.format["format_kwargs"] if dataset.format["type"] == "custom" else {}
        # A copy, of which the features may be changed.
        self._dataset = dataset.with_format("custom" if transform else None, **transform)
        _leave_closed(self._dataset.info.features)  # `dataset.features` would be a copy
        self._features = self._dataset.features

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, object]:
        try:
            row: Mapping[str, object] = self._dataset[index]
        except IndexError:
            raise
        except Exception as error:  # a damaged column raises whatever its reader meets first
            where = f"{self._name}, row {index + 1}"
            raise InputError(f"{where}: cannot be read ({first_line(error)}); write the data again") from error
        return plain_row(row, self._features)

    def content(self) -> Iterator[bytes]:
        """The columns as Arrow writes them, some rows at a time, and how they are read.

        Raises:
            ValueError: Where a transform makes the rows, which may be any program.
        """
        import pyarrow

        if self._dataset.format["type"] is not None:
            raise ValueError("rows that a transform makes")
        yield repr(self._features).encode()
        for table in self._dataset.with_format("arrow").iter(_PIECE):
            written = pyarrow.BufferOutputStream()
            # Without what datasets notes beside the columns.
            with pyarrow.ipc.new_stream(written, table.schema.remove_metadata()) as stream:
                stream.write_table(table)
            yield written.getvalue().to_pybytes()


def read_iterable(dataset: "datasets.IterableDataset") -> Iterator[Mapping[str, object]]:
    """The rows of a dataset that can only be gone through, as `Stored` gives them."""
    features = dataset.features
    closed = dataset.with_format(None)
    if features is not None:
        closed = closed.decode(False)
    for row in closed:
        yield plain_row(row, features)


def _leave_closed(feature: object) -> None:
    if isinstance(feature, Mapping):
        feature = list(feature.values())
    if isinstance(feature, list | tuple):
        for part in feature:
            _leave_closed(part)
    elif hasattr(feature, "decode"):
        if not _is_json(feature):  # which is text that holds any value, and opens nothing
            feature.decode = False
    else:
        _leave_closed(getattr(feature, "feature", ()))


def plain_row(row: Mapping[str, object], features: Mapping[str, object] | None = None) -> dict[str, object]:
    """A row of a table as it was before it became one.

    Objects lose the keys that are null, lists keep their places. A null column stays: it says that the table has it.

    Args:
        row: Columns and their values.
        features: Their types as datasets has them, where they are known.

    Example:
        >>> plain_row({"tools": {"name": ["till"], "strict": [None]}, "messages": None})
        {'tools': [{'name': 'till'}], 'messages': None}
    """
    features = features or {}
    return {name: _without_nulls(_listed(name, value), features.get(name)) for name, value in row.items()}


def _listed(name: str, value: object) -> object:
    """A column that is a list of objects, as one."""
    if isinstance(value, Mapping) and (name in _LISTS or any(key in value for key in _ROLES)):
        value = _transposed(value)
    if not isinstance(value, list):
        return value
    return [
        {key: _transposed(part) if key in _LISTS_OF_TURN else part for key, part in turn.items()}
        if isinstance(turn, Mapping) and any(key in turn for key in _ROLES)
        else turn
        for turn in value
    ]


def _transposed(value: object) -> object:
    """An object of lists, all of one length, as a list of objects; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    columns = {key: part for key, part in value.items() if part is not None}
    if not columns or not all(isinstance(part, list) for part in columns.values()):
        return value
    if len({len(part) for part in columns.values()}) > 1:
        return value
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


def _without_nulls(value: object, feature: object) -> object:
    if _is_json(feature):  # its nulls were written by somebody
        return value
    if isinstance(value, Mapping):
        inner = feature if isinstance(feature, Mapping) else {}
        return {
            key: part if isinstance(part, str) else _without_nulls(part, inner.get(key))
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list):
        entry = _entry(feature)
        return [part if isinstance(part, str) else _without_nulls(part, entry) for part in value]
    return value


def _entry(feature: object) -> object:
    """The type of a list's entries; of an object of lists, which the list may have been, that object's."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    if isinstance(feature, Mapping):
        return {key: _entry(part) for key, part in feature.items()}
    return getattr(feature, "feature", None)


def _is_json(feature: object) -> bool:
    return type(feature).__name__ == "Json"


def read_parquet(path: Path) -> "datasets.Dataset":
    """The table of a Parquet file."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    check_file(path)
    # Memory-mapped, and with no copy in datasets' cache folder.
    with parquet.ParquetFile(path, memory_map=True) as file:
        table = pyarrow.Table.from_batches(_unpacked(file, path.stat().st_size), file.schema_arrow)
    table.validate(full=True)
    return datasets.Dataset(table)


def stream_parquet(path: Path, name: str) -> Iterator[Mapping[str, object]]:
    """The rows of a Parquet file, of which a batch at a time is in memory.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        ValueError: For a batch that takes half of the free memory, or 1,000 times the file's size.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    check_file(path)
    # Not memory-mapped: pages of the file that have been read would count as memory.
    with parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
        for batch in _unpacked(file, path.stat().st_size, most_rows=_STREAMED, together=False):
            table = pyarrow.Table.from_batches([batch], file.schema_arrow)
            table.validate(full=True)
            rows = Stored(name, datasets.Dataset(table))
            yield from (rows[index] for index in range(len(rows)))


def _unpacked(
    file: "parquet.ParquetFile", nbytes: int, *, most_rows: int = 2**16, together: bool = True
) -> "Iterator[pyarrow.RecordBatch]":
    """The rows of a file of `nbytes` in batches of so many rows at most, which are in memory together or one by one.

    Raises:
        ValueError: Where they take half of the free memory, or more than 1 GiB and 1,000 times the file's size: a few
            bytes can stand for any number of equal long texts.
    """
    free = free_memory() or 2**32
    limit, size = min(max(2**30, 1000 * nbytes), free // 2), 0
    for group in range(file.num_row_groups):
        columns = file.metadata.row_group(group)
        # No value is longer than its column's pages, whatever they say of equal ones.
        longest = max((columns.column(i).total_uncompressed_size for i in range(columns.num_columns)), default=0)
        # So they seldom are in ordinary files, whose row groups may be large: those want more than a few at once.
        few = min(_FEW, free // 4 // max(1, longest))
        rows = min(most_rows, max(1, few, _BATCH // max(1, longest)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
            size = batch.nbytes + size * together
            if size > limit:
                raise ValueError(f"its {nbytes:,} bytes stand for more than {limit / 2**30:.1f} GiB of rows")
            yield batch


def read_arrow(path: Path) -> "datasets.Dataset":
    """The table of an Arrow file, memory-mapped: a stream, as datasets' cache has them, or what Arrow calls a file."""
    import datasets
    import pyarrow

    check_file(path)
    with path.open("rb") as file:
        # A file is a stream, too, between these bytes and a table of contents, which nothing here leans on.
        start = len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0
    check_arrow(path, start)
    opened = pyarrow.memory_map(str(path))
    opened.seek(start)
    return datasets.Dataset(pyarrow.ipc.open_stream(opened).read_all())


def check_arrow(file: Path, start: int = 0) -> None:
    """Looks through an Arrow file, whose stream starts at that byte.

    Raises:
        ValueError: Where lengths and offsets do not fit together, which Arrow itself would end the process for, and for
            compressed batches, which can say that they take any amount of memory.
    """
    import pyarrow

    check_file(file)
    with pyarrow.memory_map(str(file)) as opened:
        opened.seek(start)
        for message in pyarrow.ipc.MessageReader.open_stream(opened):
            if is_compressed(message):
                raise ValueError("its batches are compressed, which datasets does not do; write them uncompressed")
        opened.seek(start)
        for batch in pyarrow.ipc.open_stream(opened):
            batch.validate(full=True)
