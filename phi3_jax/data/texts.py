"""Many texts in one array of bytes, which takes less memory than objects and can lie in a file."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray


class Texts(Sequence[str]):
    """Texts, each made when asked for.

    Attributes:
        content: All of them end to end, as UTF-8.
        offsets: Text `i` is `[offsets[i], offsets[i + 1])`.

    Example:
        >>> texts = Texts.of(["the hen", "", "ä"])
        >>> len(texts), texts[-1], list(texts), texts.content.nbytes
        (3, 'ä', ['the hen', '', 'ä'], 9)
    """

    def __init__(self, content: UInt8[ndarray, "bytes"], offsets: Int64[ndarray, "texts+1"]) -> None:
        self.content, self.offsets = content, offsets

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """These texts; themselves if they are `Texts` already."""
        if isinstance(texts, Texts):
            return texts
        pieces = [encoded(text) for text in texts]
        offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(pieces), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]  # which raises where there is none
        return decoded(self.content[self.offsets[index] : self.offsets[index + 1]].tobytes())


def encoded(text: str) -> bytes:
    """UTF-8, also of the halves of characters that JSON can hold."""
    return text.encode("utf-8", "surrogatepass")


def decoded(content: bytes) -> str:
    """The text of `encoded`. Raises `ValueError` for what is none."""
    return content.decode("utf-8", "surrogatepass")
