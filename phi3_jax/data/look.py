"""A look at a file of rows before there is a run: how many, of which form, how long."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from phi3_jax.config.sections import DataSection
from phi3_jax.data.chat import ChatTokenizer
from phi3_jax.data.prepare import tokenize_rows
from phi3_jax.data.row_tokenizer import Row
from phi3_jax.data.rows import DataStats
from phi3_jax.data.sources import load_sources
from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.system.errors import InputError

MOST_ROWS = 2000
_ANY_LENGTH = 2**24


@dataclass(frozen=True)
class RowsLook:
    """What was seen of the rows of a source.

    Attributes:
        rows: How many there are.
        columns: Of the first one.
        lengths: Tokens of those that were looked at, up to `MOST_ROWS`, evenly spread.
        targets: Tokens of each of them that would be trained on.
        stats: What became of them.
    """

    rows: int
    columns: list[str]
    lengths: Int[np.ndarray, " looked"]
    targets: Int[np.ndarray, " looked"]
    stats: DataStats

    @property
    def tokens(self) -> float:
        """Of all rows, by the mean of those that were looked at."""
        return float(self.rows * self.lengths.mean())


def look_at(data: DataSection, tokenizer: Tokenizer) -> RowsLook:
    """Reads rows as training would, of large sources some, evenly spread; none is cut.

    Args:
        data: Whose `train` it is, and how rows are read.
        tokenizer: The checkpoint's.

    Raises:
        InputError: As `prepare_data`; a row that is wrong is named.
    """
    sources = load_sources(data.require_train(), split=data.split, dataset_config=data.dataset_config)
    rows = [Row(source, index) for source in sources for index in range(len(source.rows))]
    if not rows:
        raise InputError(f"{data.train}: no usable rows; the data is empty")
    data = replace(data, max_length=_ANY_LENGTH, packing=False, cache=False)
    chosen = np.unique(np.linspace(0, len(rows) - 1, MOST_ROWS).astype(int)) if len(rows) > MOST_ROWS else None
    looked = rows if chosen is None else [rows[index] for index in chosen]
    found = tokenize_rows(looked, ChatTokenizer.of_section(tokenizer, data), data, seed=0)
    targets = np.add.reduceat(found.loss_mask.astype(np.int64), found.offsets[:-1])
    first = sources[0].rows[0]
    return RowsLook(len(rows), list(first), np.asarray(found.lengths), targets, found.stats)
