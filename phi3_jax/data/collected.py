"""Tokenised rows as they come, in arrays that grow: 5 bytes a token and no object."""

from array import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from phi3_jax.data.row_tokenizer import TokenizedRow
from phi3_jax.data.texts import encoded


class Collected:
    """Rows, one after the other.

    Args:
        names: Of the sources that they may be from.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        # Each grows in place by an eighth, which costs less than to put pieces together at the end.
        self._ids, self._mask, self._texts = bytearray(), bytearray(), bytearray()
        self._offsets, self._text_offsets = array("q", [0]), array("q", [0])
        self._prompts, self._lengths, self._sources, self._indices = array("i"), array("i"), array("i"), array("q")

    def add(self, row: TokenizedRow) -> None:
        """Takes one more."""
        self._ids += row.ids.astype(np.int32, copy=False).tobytes()
        self._mask += row.mask.astype(np.uint8, copy=False).tobytes()
        self._texts += encoded(row.reference)
        self._offsets.append(len(self._mask))
        self._text_offsets.append(len(self._texts))
        self._prompts.append(row.prompt_length)
        self._lengths.append(row.length)
        self._sources.append(self._numbers[row.row.source.name])
        self._indices.append(row.row.index)

    def arrays(self) -> dict[str, Shaped[ndarray, "_"]]:
        """Those of `row_arrays.from_arrays`, and `lengths` before rows were cut; without a copy, so that no row can be
        added any more."""
        return {
            "lengths": np.frombuffer(self._lengths, np.int32),
            "input_ids": np.frombuffer(self._ids, np.int32),
            "loss_mask": np.frombuffer(self._mask, np.uint8),
            "offsets": np.frombuffer(self._offsets, np.int64),
            "prompt_lengths": np.frombuffer(self._prompts, np.int32),
            "reference_bytes": np.frombuffer(self._texts, np.uint8),
            "reference_offsets": np.frombuffer(self._text_offsets, np.int64),
            "source_numbers": np.frombuffer(self._sources, np.int32),
            "row_numbers": np.frombuffer(self._indices, np.int64),
        }
