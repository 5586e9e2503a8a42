"""Text that is shown to people: on one line, bounded, and unable to steer a terminal."""

import json
import re
import reprlib
from typing import TextIO

# Characters that steer a terminal, or reorder or hide what stands beside them: controls (line breaks and
# tabs are fine), lone surrogates, marks of bidirectional text, separators, zero widths, tags.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_HEAD, _TAIL = 3000, 900  # of a line that is cut; what to do stands at its end


def escape(match: re.Match[str]) -> str:
    """The character as Python would write it: `\\x1b`, `\\u202e`."""
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def printable(text: str) -> str:
    """The text with every character of `INVISIBLE` written out."""
    return INVISIBLE.sub(escape, text)


def write_piece(text: str, out: TextIO) -> None:
    """Writes a part of a text at once: as it is, but printable where `out` is a terminal."""
    print(printable(text) if out.isatty() else text, end="", file=out, flush=True)


def json_line(value: object) -> str:
    """JSON on one line, in which what `printable` writes out is written out as JSON does: `\\u001b`."""
    return INVISIBLE.sub(lambda match: json.dumps(match[0])[1:-1], json.dumps(value, ensure_ascii=False))


def counted(count: int, what: str) -> str:
    """So many of a thing.

    Example:
        >>> counted(1, "row"), counted(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def one_line(text: str) -> str:
    """The text on one line, printable, and cut in the middle where it is longer than 4,000 characters."""
    if len(text) > _HEAD + _TAIL + 100:
        text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return printable(" ".join(text.splitlines()))


def first_line(error: BaseException) -> str:
    """What an error of another library says, its first line after its type: `KeyError: 'model'`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Short(reprlib.Repr):
    """`repr` that looks at a few entries and levels only, however much there is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 100, 100, 60


_SHORT = _Short()


def shown(value: object) -> str:
    """A value from a file as an error message quotes it: `repr`, cut short."""
    return _SHORT.repr(value)
