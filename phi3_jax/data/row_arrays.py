"""Tokenised rows as a few plain arrays, for files and for other hosts, and checked when they come back."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray

from phi3_jax.data.rows import DataStats, Origins, TokenizedRows
from phi3_jax.data.texts import Texts

# Their types; all have one axis.
TYPES: Mapping[str, type[np.generic]] = {
    "input_ids": np.int32,
    "loss_mask": np.uint8,
    "offsets": np.int64,
    "prompt_lengths": np.int32,
    "reference_bytes": np.uint8,
    "reference_offsets": np.int64,
    "source_numbers": np.int32,
    "row_numbers": np.int64,
}


def to_arrays(rows: TokenizedRows) -> dict[str, Shaped[ndarray, "_"]]:
    """All of the rows but their statistics and the names of their sources.

    Raises:
        ValueError: For rows that are from no source.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> where = Origins(["chats.jsonl"], np.zeros(1, np.int32), np.array([4]))
        >>> some = np.array([5, 6], np.int32), np.array([0, 1], np.uint8), np.array([0, 2])
        >>> rows = TokenizedRows(*some, np.ones(1, np.int32), ["six"], DataStats(["chats.jsonl"]), where)
        >>> arrays = to_arrays(rows)
        >>> arrays["reference_bytes"].tobytes(), arrays["row_numbers"].tolist()
        (b'six', [4])
        >>> from_arrays(arrays, rows.stats, ["chats.jsonl"]).where(0)
        'chats.jsonl, row 5'
    """
    if rows.origins is None:
        raise ValueError("rows that are from no source")
    references = Texts.of(rows.references)
    arrays = {
        "input_ids": rows.input_ids,
        "loss_mask": rows.loss_mask,
        "offsets": rows.offsets,
        "prompt_lengths": rows.prompt_lengths,
        "reference_bytes": references.content,
        "reference_offsets": references.offsets,
        "source_numbers": rows.origins.source,
        "row_numbers": rows.origins.number,
    }
    return {name: np.ascontiguousarray(array, TYPES[name]) for name, array in arrays.items()}


def from_arrays(
    arrays: Mapping[str, Shaped[ndarray, "_"]], stats: DataStats, names: Sequence[str], *, vocabulary: int = 2**31
) -> TokenizedRows:
    """The rows of `to_arrays`.

    Args:
        arrays: Those, by name.
        stats: What became of the rows.
        names: Of the sources.
        vocabulary: What every id is below.

    Raises:
        ValueError: For arrays that are not such, or do not fit together.
    """
    _check_kinds(arrays)
    ids, mask, prompts = arrays["input_ids"], arrays["loss_mask"], arrays["prompt_lengths"]
    offsets, sources, numbers = arrays["offsets"], arrays["source_numbers"], arrays["row_numbers"]
    texts = Texts(arrays["reference_bytes"], arrays["reference_offsets"])
    rows = len(offsets) - 1
    _require(rows > 0, "there is no row")
    _require(len(ids) == len(mask), f"{len(ids)} ids, and {len(mask)} marks of targets")
    _require(all(len(each) == rows for each in (prompts, texts, sources, numbers)), "not as many of each as rows")
    _check_offsets(offsets, len(ids), least=1)
    _check_offsets(texts.offsets, len(texts.content), least=0)
    _require(int(ids.min()) >= 0 and int(ids.max()) < vocabulary, "ids that the tokenizer does not have")
    _require(int(mask.max()) <= 1, "marks of targets other than 0 and 1")
    _require(int(prompts.min()) >= 0 and bool(np.all(prompts <= np.diff(offsets))), "prompts longer than their rows")
    _require(int(sources.min()) >= 0 and int(sources.max()) < len(names), "rows of sources that are not there")
    _require(int(numbers.min()) >= 0, "rows before the first")
    return TokenizedRows(ids, mask, offsets, prompts, texts, stats, Origins(names, sources, numbers))


def _check_kinds(arrays: Mapping[str, Shaped[ndarray, "_"]]) -> None:
    _require(set(arrays) == set(TYPES), f"the arrays {sorted(arrays)}")
    for name, array in arrays.items():
        _require(array.dtype == TYPES[name] and array.ndim == 1, f"{name} is {array.dtype} {array.shape}")


def _check_offsets(offsets: Int[ndarray, "rows+1"], end: int, *, least: int) -> None:
    is_whole = offsets[0] == 0 and offsets[-1] == end and bool(np.all(np.diff(offsets) >= least))
    _require(is_whole, "rows that do not follow one another")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
