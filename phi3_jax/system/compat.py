"""What leans on the insides of other libraries, each with the reason; a test of each fails when the inside changes."""

import json
import struct
from typing import Protocol


class TokenizersStep(Protocol):
    """A step of a tokenizer of the tokenizers library: a normalizer, a pre-tokenizer, a decoder."""

    def __getstate__(self) -> bytes: ...


def step_state(step: TokenizersStep | None) -> object:
    """What a step of a tokenizer consists of, as tokenizer.json has it; None where there is no step.

    The library gives it out as JSON of the whole tokenizer alone, vocabulary and all, which takes a tenth of a
    second; what a step pickles itself as is the same JSON.
    """
    return None if step is None else json.loads(step.__getstate__())


class _Buffer(Protocol):
    def to_pybytes(self) -> bytes: ...


class ArrowMessage(Protocol):
    """`pyarrow.ipc.Message`."""

    @property
    def type(self) -> str: ...

    @property
    def metadata(self) -> _Buffer: ...


def is_compressed(message: ArrowMessage) -> bool:
    """Whether an Arrow message holds compressed arrays.

    They are made as long as they say when pyarrow reads them, before anything can be checked, and pyarrow has no
    limit for that and no word of the compression: only the message's metadata, a FlatBuffer, says it. What is
    read here is laid down in Arrow's format/Message.fbs: the third field of a message is its header, of a
    dictionary's header the second its record batch, of a record batch the fourth its compression.
    """
    data = message.metadata.to_pybytes()

    def number(kind: str, place: int) -> int:
        return int(struct.unpack_from(kind, data, place)[0])

    def field(table: int, index: int) -> int | None:
        """Where a table's field is; None where it has its default."""
        names = table - number("<i", table)
        offset = number("<H", names + 4 + 2 * index) if 4 + 2 * index < number("<H", names) else 0
        return table + offset if offset else None

    def inner(place: int | None) -> int:
        assert place is not None
        return place + number("<I", place)

    header = field(inner(0), 2)
    if message.type == "dictionary":
        header = field(inner(header), 1)
    elif message.type != "record batch":
        return False
    return field(inner(header), 3) is not None
