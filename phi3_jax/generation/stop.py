"""Texts that end an answer."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.data.tokenizer import Tokenizer
from phi3_jax.generation.tokens import TokenBytes, decode, special_ids


class StopStrings:
    """Where rows of tokens come to contain a stop string; a `Watch` of `generate`.

    A row ends with the token that completes a stop string, also where that string began inside a token
    or in the prompt, and where the token goes on after it. These are the positions of transformers'
    `StopStringCriteria`.

    Args:
        tokenizer: What made the tokens.
        strings: None of them empty.
        prompts: The tokens of each row's prompt, without padding.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings), default=0)
        ends = [map(int, prompt[max(0, len(prompt) - self._longest) :]) for prompt in prompts]
        self._tails = [self._end(b"".join(map(self._bytes, end))) for end in ends]
        self._answers: list[list[int]] = [[] for _ in prompts]
        self._matched = [0] * len(prompts)

    def __call__(self, new: Int[ndarray, "rows chunk"] | Sequence[Int[ndarray, "chunk"]]) -> Int[ndarray, "rows"]:
        """For each row the number of these tokens that it keeps where it ends among them, else -1."""
        kept = np.full(len(new), -1)
        for row, tokens in enumerate(new):
            for position, token in enumerate(tokens.tolist()):
                if self._matched[row]:
                    break
                if self._ends_with(row, token):
                    kept[row] = position + 1
        return kept

    def has_ended(self, row: int) -> bool:
        """Whether the row contains a stop string."""
        return self._matched[row] > 0

    def text(self, row: int) -> str:
        """The row's answer so far, cut before the stop string, without special tokens."""
        tokens, surplus = list(self._answers[row]), self._matched[row]
        while tokens and surplus and surplus >= len(self._bytes(tokens[-1])):
            surplus -= len(self._bytes(tokens.pop()))
        if not tokens or not surplus:
            return decode(self._tokenizer, tokens)
        if tokens[-1] in special_ids(self._tokenizer):
            return decode(self._tokenizer, tokens[:-1])
        text = decode(self._tokenizer, tokens)
        return text[: len(text) - len(self._bytes(tokens[-1])[-surplus:].decode(errors="replace"))]

    def open_tokens(self, row: int) -> int:
        """How many of the row's last tokens hold what may become a stop string with those to come."""
        tail = self._tails[row]
        sizes = [size for string in self._strings for size in range(len(string)) if tail.endswith(string[:size])]
        begun = max(sizes, default=0)
        count = 0
        while begun > 0 and count < len(self._answers[row]):
            count += 1
            begun -= len(self._bytes(self._answers[row][-count]))
        return count

    def _ends_with(self, row: int, token: int) -> bool:
        """Adds a token to a row, and says whether it completes a stop string."""
        tail = self._tails[row]
        seen = tail + self._bytes(token)
        # Each search begins where a match would still end in this token.
        starts = [seen.find(string, max(0, len(tail) - len(string) + 1)) for string in self._strings]
        found = [start for start in starts if start >= 0]
        self._answers[row].append(token)
        self._tails[row] = self._end(seen)
        if found:
            self._matched[row] = len(seen) - min(found)
        return bool(found)

    def _end(self, written: bytes) -> bytes:
        """As much as a stop string that is not complete can take up."""
        return written[max(0, len(written) - self._longest + 1) :]
