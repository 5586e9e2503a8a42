"""safetensors files, read and written straight between the file and an array's memory.

The safetensors library maps a file into memory, so that the pages read count as the process's own
beside the arrays they are copied to. Reading with `readinto` keeps one copy only.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

from phi3_jax.system.errors import InputError
from phi3_jax.system.numbers import is_whole
from phi3_jax.system.reading import check_file, parse_json

# The kinds of number that weights come in.
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Those, and what quantised weights come in.
READABLE = {**FLOATS, "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
MAX_HEADER = 4 * 2**20  # bytes, ten times those of the largest; what they describe takes many times that
MAX_COUNT = 2**63  # of numbers and bytes
MAX_RANK = 32
CHUNK = 1 << 18  # numbers read at a time


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are: `start` counts from the file's first byte."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write; `read` gives it when its turn comes, so that one at a time is in memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name; their data is not read.

    Raises:
        InputError: For a file that is cut off or too long, and for a header that is no JSON, names a tensor twice,
            or has sizes and offsets that do not fit together.
    """
    return _read_header(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors. Raises as `read_header`."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    check_file(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise InputError(f"{path}: {size} bytes are no whole safetensors file; download it again")
            if length > MAX_HEADER:
                raise InputError(f"{path}: its header has {length} bytes, expected {MAX_HEADER} at most")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = parse_json(text.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__} instead of an object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not a mapping of texts")
        entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
        end = _check_gapless(entries, 8 + length)
    except ValueError as error:
        raise InputError(f"{path}: its safetensors header is broken ({error}); download it again") from error
    if end != size:
        state = "is cut off" if size < end else "is too long"
        raise InputError(f"{path}: {state}: {size} bytes, but its header speaks of {end}; download it again")
    return {entry.name: entry for entry in entries}, metadata


def _is_count(value: object) -> bool:
    return is_whole(value) and 0 <= value < MAX_COUNT


def _nbytes(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * ITEM_SIZES[entry.dtype]


def _entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    label = f"tensor {name[:100]!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise ValueError(f"{label} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"{label} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise ValueError(f"{label} has no proper shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{label} has no proper data_offsets")
    entry = TensorEntry(path, name, dtype, tuple(shape), data_start + offsets[0])
    if _nbytes(entry) >= MAX_COUNT:
        raise ValueError(f"{label} has a shape of more than 2^63 bytes")
    if offsets[1] - offsets[0] != _nbytes(entry):
        raise ValueError(f"{label} has {offsets[1] - offsets[0]} bytes, its shape needs {_nbytes(entry)}")
    return entry


def _check_gapless(entries: Sequence[TensorEntry], start: int) -> int:
    """The format allows no overlap and no hole. Returns where the file must end."""
    # An empty tensor starts where the next one does: it goes first.
    for entry in sorted(entries, key=lambda e: (e.start, _nbytes(e))):
        if entry.start != start:
            raise ValueError(f"tensor {entry.name[:100]!r} {'overlaps' if entry.start < start else 'leaves a hole'}")
        start += _nbytes(entry)
    return start


def read_tensor(
    entry: TensorEntry,
    out: np.ndarray,
    index: tuple[slice, ...] | None = None,
    look: Callable[[np.ndarray], None] | None = None,
) -> None:
    """Fills `out`, C-contiguous, with the tensor or the part of it at `index`, converted to its dtype chunk by chunk.

    No other bytes are read: some of the rows are one piece of the file, some of the columns one for each row.

    Args:
        entry: The tensor.
        out: Where it goes, of the part's shape.
        index: A slice without steps for each axis.
        look: Called with each piece of `out` as soon as it is there, while it still is in the processor's cache.
    """
    direct = READABLE[entry.dtype] == out.dtype
    flat = out.reshape(-1)
    for start, part in _pieces(entry, index, flat if direct else None):
        if not direct:
            flat[start : start + part.size] = part
        if look is not None:
            look(flat[start : start + part.size])


def equals(entry: TensorEntry, array: np.ndarray, index: tuple[slice, ...] | None = None) -> bool:
    """Whether the tensor, or the part of it at `index`, converted to the array's dtype is the array, bit for bit."""
    flat = array.reshape(-1)
    return _part_shape(entry, index) == array.shape and all(
        np.array_equal(part.astype(flat.dtype).view(np.uint8), flat[start : start + part.size].view(np.uint8))
        for start, part in _pieces(entry, index, None)
    )


def _bounds(entry: TensorEntry, index: tuple[slice, ...] | None) -> list[range]:
    whole = (slice(None),) * len(entry.shape)
    return [range(*cut.indices(size)) for cut, size in zip(index or whole, entry.shape, strict=True)]


def _part_shape(entry: TensorEntry, index: tuple[slice, ...] | None) -> tuple[int, ...]:
    return tuple(map(len, _bounds(entry, index)))


def _runs(entry: TensorEntry, index: tuple[slice, ...] | None) -> Iterator[tuple[int, int]]:
    """Which runs of the tensor's numbers make up the part: the first and the length of each, in order."""
    bounds = _bounds(entry, index)
    # Axes behind the last one that is cut are in one piece with it.
    cut = max((axis for axis, size in enumerate(entry.shape) if len(bounds[axis]) < size), default=0)
    strides = [math.prod(entry.shape[axis + 1 :]) for axis in range(len(bounds))]
    last = bounds[cut] if bounds else range(1)
    stride = math.prod(entry.shape[cut + 1 :])
    for outer in itertools.product(*bounds[:cut]):
        place = sum(i * step for i, step in zip(outer, strides[:cut], strict=True))
        yield place + last.start * stride, len(last) * stride


def _pieces(
    entry: TensorEntry, index: tuple[slice, ...] | None, out: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray]]:
    """The part's numbers in pieces, each with its place in the part: read into `out`, flat, or where that is
    None into memory that the next piece takes again."""
    place = 0
    chunk = np.empty(min(CHUNK, math.prod(_part_shape(entry, index))) if out is None else 0, READABLE[entry.dtype])
    with FileIO(entry.path) as file:
        for first, length in _runs(entry, index):
            file.seek(entry.start + first * chunk.itemsize)
            for done in range(0, length, CHUNK):
                count = min(CHUNK, length - done)
                piece = chunk[:count] if out is None else out[place : place + count]
                _read_exactly(file, piece)
                yield place, piece
                place += piece.size


def _read_exactly(file: FileIO, out: np.ndarray) -> None:
    view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)
        if not count:
            raise InputError(f"{file.name}: became shorter while it was read; download it again")
        view = view[count:]


def write_safetensors(
    path: Path, tensors: Sequence[TensorSource], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes the file that `safetensors.torch.save_file` would, one tensor in memory at a time.

    Args:
        path: The file.
        tensors: In the order in which they are to lie there.
        metadata: Texts to lie beside them.
    """
    names = {dtype: name for name, dtype in READABLE.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read())
            view = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while view:
                view = view[file.write(view) :]
