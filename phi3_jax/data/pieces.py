"""Rows cut into the pieces that TRL's `pack_dataset` makes of them, where it splits rows to lose nothing of them."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.rows import Origins, TokenizedRows

# Rows that it is given at once, by datasets' `map`; what is left of one such block does not go on in the next.
BLOCK = 1000


def pieces(rows: TokenizedRows, data: DataSection) -> TokenizedRows:
    """What is packed of the rows: themselves, but for the strategies `bfd_split` and `wrapped`.

    `bfd_split` cuts each row every `data.max_length` tokens; `wrapped` all rows together, end to end. Both arrays of
    tokens stay where they are. The first token of a piece is predicted from nothing, and no target.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> offsets = np.array([0, 2, 7])  # rows of 2 and 5 tokens
        >>> rows = TokenizedRows(np.arange(7), np.ones(7, np.uint8), offsets, np.zeros(2, int), ["", ""], DataStats())
        >>> [pieces(rows, DataSection(max_length=3, packing_strategy=name)).lengths.tolist()
        ...  for name in ("bfd", "bfd_split", "wrapped")]
        [[2, 5], [2, 3, 2], [3, 3, 1]]
    """
    if not data.packing or data.packing_strategy not in ("bfd_split", "wrapped"):
        return rows
    bounds = np.append(np.arange(0, len(rows), BLOCK), len(rows))
    spans = rows.offsets[bounds] if data.packing_strategy == "wrapped" else rows.offsets
    starts = _every(spans, data.limit)
    mask = rows.loss_mask.copy()
    mask[starts] = 0
    begun = np.searchsorted(rows.offsets, starts, side="right") - 1  # the row that each piece begins in
    origins = rows.origins
    return TokenizedRows(
        rows.input_ids,
        mask,
        np.append(starts, rows.offsets[-1]),
        np.zeros(len(starts), np.int32),
        [""] * len(starts),
        rows.stats,
        None if origins is None else Origins(origins.names, origins.source[begun], origins.number[begun]),
        rows,
        np.searchsorted(starts, rows.offsets[bounds[:-1]]),
    )


def _every(offsets: Int[ndarray, "spans+1"], size: int) -> Int[ndarray, "pieces"]:
    """Where the pieces of so many tokens begin that each span is cut into; its last one may be shorter."""
    counts = -(-np.diff(offsets) // size)
    first = np.cumsum(counts) - counts
    starts: Int[ndarray, "pieces"] = np.repeat(offsets[:-1], counts)
    starts += size * (np.arange(len(starts)) - np.repeat(first, counts))
    return starts
