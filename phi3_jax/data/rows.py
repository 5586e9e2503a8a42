"""Tokenised rows, compact in memory, and what there is to say of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

MOST_NAMED = 1000  # rows in a list of names


@dataclass
class DataStats:
    """What became of a data set's rows; JSON-able through `to_dict`.

    Attributes:
        sources: Where the rows are from.
        rows: How many are used.
        skipped: How many had nothing to train on.
        invalid: How many were left out for another fault.
        left_out: Those of both kinds, each its name and the reason; the first 1,000.
        formats: How many rows had which format.
        passed_over: Columns, and keys of turns, that nothing reads, with the number of rows.
        remarks: What was taken in another way than a reader may think, with the number of rows.
        literal_rows: Rows whose ids differ from `apply_chat_template`'s, since control tokens in a text stay text.
        first_literal: The first of these, by name.
        truncated: How many were longer than max_length.
        truncated_rows: Those by name; the first 1,000.
        dropped_turns: System turns that the chat template leaves out.
        tokens: Of all rows together, as they are used.
        target_tokens: Those of them that are trained on.
        longest: Tokens of the longest row, before it is cut.
        packing_efficiency: The share of positions that hold tokens; None without packing.
        lengths: The histogram of `length_histogram`.
        length_figures: Their `length_figures`.
        notices: What the user should know.
    """

    sources: list[str] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0
    invalid: int = 0
    left_out: list[list[str]] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)
    literal_rows: int = 0
    first_literal: str | None = None
    truncated: int = 0
    truncated_rows: list[str] = field(default_factory=list)
    dropped_turns: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    packing_efficiency: float | None = None
    lengths: dict[str, list[int]] | None = None
    length_figures: dict[str, int] | None = None
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Plain values, as JSON has them."""
        return asdict(self)

    def leave_out(self, where: str, why: str, *, is_empty: bool) -> None:
        """Counts a row that is not used: one with nothing to train on, or one with another fault."""
        self.skipped += is_empty
        self.invalid += not is_empty
        if len(self.left_out) < MOST_NAMED:
            self.left_out.append([where, why])

    @classmethod
    def from_dict(cls, given: object) -> "DataStats":
        """Those of `to_dict`, from JSON.

        Raises:
            ValueError: For what is none.
        """
        plain, names = cls().to_dict(), {each.name for each in fields(cls)}
        if not isinstance(given, dict) or set(given) != names:
            raise ValueError("statistics of other names")
        wrong = [name for name, value in plain.items() if value is not None and type(given[name]) is not type(value)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {given[wrong[0]]!r:.50}")
        return cls(**given)

    def summary(self, name: str) -> str:
        """One line, and one more for each notice."""
        share = self.target_tokens / max(self.tokens, 1)
        parts = [
            f"{name}: {self.rows:,} rows, {self.tokens:,} tokens ({share:.0%} targets), longest {self.longest:,}",
            f"{self.truncated:,} truncated" if self.truncated else "",
            f"{self.skipped:,} skipped" if self.skipped else "",
            f"{self.invalid:,} invalid" if self.invalid else "",
            f"{self.dropped_turns:,} system turns left out" if self.dropped_turns else "",
            f"{self.packing_efficiency:.1%} of positions used" if self.packing_efficiency is not None else "",
        ]
        return "\n".join([", ".join(part for part in parts if part), *(f"  note: {text}" for text in self.notices)])


def length_histogram(
    lengths: Sequence[int] | Int[ndarray, "rows"], max_length: int | None, *, bins: int = 30
) -> dict[str, list[int]]:
    """How many rows have which length: `counts[i]` of them from `edges[i]` to below `edges[i + 1]`.

    In at most about `bins` bins of equal, whole width. Rows longer than `max_length` are in none; null counts all.

    Example:
        >>> length_histogram([3, 4, 4, 9], 8)
        {'edges': [3, 4, 5], 'counts': [1, 2]}
    """
    found = np.asarray(lengths, np.int64)
    fitting = found if max_length is None else found[found <= max_length]
    if not fitting.size:
        return {"edges": [], "counts": []}
    low, high = int(fitting.min()), int(fitting.max()) + 1
    width = -(-(high - low) // bins)
    edges = np.arange(low, high + width, width)
    return {"edges": edges.tolist(), "counts": np.histogram(fitting, edges)[0].tolist()}


def length_figures(lengths: Sequence[int] | Int[ndarray, "rows"]) -> dict[str, int]:
    """The shortest, the middle one, that which 95 of 100 rows do not exceed, and the longest.

    Example:
        >>> length_figures([5, 3, 4, 900])
        {'min': 3, 'median': 4, 'p95': 900, 'max': 900}
    """
    quantiles = np.quantile(np.asarray(lengths, np.int64), [0, 0.5, 0.95, 1], method="inverted_cdf")
    return dict(zip(("min", "median", "p95", "max"), map(int, quantiles), strict=True))


class Origins(NamedTuple):
    """Where rows stand: `names` of the sources, and of each row its `source` among them and `number` therein."""

    names: Sequence[str]
    source: Int[ndarray, "rows"]
    number: Int[ndarray, "rows"]  # from 0


class TokenizedRows:
    """Rows of `(input_ids int32, loss_mask uint8)`, kept as two flat arrays.

    Attributes:
        input_ids: All rows end to end.
        loss_mask: 1 where the token is a target, that is, predicted from those before it; never at the first of a row.
        offsets: Row `i` is `[offsets[i], offsets[i + 1])`.
        prompt_lengths: Tokens before the last assistant turn, 0 where there is none.
        references: The last assistant turn's text.
        stats: What became of the rows of the source.
        origins: Where the rows stand; None where they are from no file.
        whole: The rows that these are pieces of; None where they are no pieces.
        blocks: The first of those pieces that are packed together, for each such block; None where they are no pieces.
    """

    def __init__(
        self,
        input_ids: Int[ndarray, "total"],
        loss_mask: UInt8[ndarray, "total"],
        offsets: Int[ndarray, "rows+1"],
        prompt_lengths: Int[ndarray, "rows"],
        references: Sequence[str],
        stats: DataStats,
        origins: Origins | None = None,
        whole: "TokenizedRows | None" = None,
        blocks: Int[ndarray, "blocks"] | None = None,
    ) -> None:
        self.input_ids, self.loss_mask, self.offsets = input_ids, loss_mask, offsets
        self.prompt_lengths, self.references, self.stats = prompt_lengths, references, stats
        self.origins, self.whole, self.blocks = origins, whole, blocks

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Int[ndarray, "row"], UInt8[ndarray, "row"]]:
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[start:end], self.loss_mask[start:end]

    def where(self, index: int) -> str:
        """How messages name a row, counting from 1: by its source, where that is known."""
        if self.origins is None:
            return f"row {index + 1}"
        names, source, number = self.origins
        return f"{names[source[index]]}, row {number[index] + 1}"

    @property
    def lengths(self) -> Int[ndarray, "rows"]:
        return np.diff(self.offsets)

    @property
    def prompts(self) -> list[tuple[Int[ndarray, "prompt"], str]]:
        """`(prompt_ids, reference text)` of every row that has a last assistant turn, for generation."""
        rows = self if self.whole is None else self.whole
        return [
            (rows[index][0][:length], rows.references[index])
            for index, length in enumerate(rows.prompt_lengths)
            if length
        ]
