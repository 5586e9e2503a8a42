"""Tokens of a document, and which of them stand for a part of its text."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from phi3_jax.data.delimiters import Delimiters
from phi3_jax.data.spans import Span

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class Encoded:
    """Tokens of a document.

    Attributes:
        ids: The tokens.
        special: Which of them are control tokens.
        encoding: What the tokenizers library says of them: the characters that each covers.
        added: How many tokens stand in front of those that it knows.
        delimiters: The control tokens around each span, where `encoding` knows no characters.
    """

    ids: Int[ndarray, "tokens"]
    special: Bool[ndarray, "tokens"]
    encoding: "Encoding"
    added: int = 0
    delimiters: Delimiters | None = None

    def covered_by(self, span: Span) -> tuple[int, int]:
        """The first token of a span, and the one behind its last.

        A word that holds also the blank before the span belongs to it. A control token that swallows
        the line break after itself, as `rstrip` makes Phi-3's do, does not.
        """
        if self.delimiters is not None:
            before, end = self.delimiters[span.start, span.end]
            return int(self._control[before + self.added]) + 1, int(self._control[end + self.added]) + 1
        first, last = self._touched(span)
        if not span.is_exact:
            special = self.special[self.added :]
            while first < last and special[first] and self._characters(first)[0] < span.start:
                first += 1
        return first + self.added, last + self.added

    def _touched(self, span: Span) -> tuple[int, int]:
        """Those of `encoding` that hold any of its characters; to ask for them is faster than to take all offsets."""
        encoding = self.encoding
        first, behind = encoding.char_to_token(span.start), encoding.char_to_token(span.end)
        if behind is None and len(encoding) and self._characters(len(encoding) - 1)[1] <= span.end:
            behind = len(encoding)
        if span.start >= span.end or first is None or behind is None:
            return self._touched_by_offsets(span)
        while behind < len(encoding) and self._characters(behind)[0] < span.end:
            behind += 1  # one that goes on beyond the end, and the other bytes of its last character
        while behind > first and self._characters(behind - 1)[0] >= span.end:
            behind -= 1  # blanks, of which some tokenizers say that they cover nothing
        return first, behind

    def _touched_by_offsets(self, span: Span) -> tuple[int, int]:
        starts, ends = self._offsets
        touched = np.flatnonzero((starts < span.end) & (ends > span.start))
        return (int(touched[0]), int(touched[-1]) + 1) if touched.size else (0, 0)

    def _characters(self, token: int) -> tuple[int, int]:
        found = self.encoding.token_to_chars(token)
        assert found is not None, "a token that nothing in the text stands for"
        return found

    @cached_property
    def _control(self) -> Int[ndarray, "control"]:
        """Which tokens are control tokens; one that is added in front is, too."""
        return np.flatnonzero(self.special)

    @cached_property
    def _offsets(self) -> Int[ndarray, "2 tokens"]:
        return np.array(self.encoding.offsets, np.int64).reshape(-1, 2).T
