"""Rendered documents, and the spans of them that are targets, by characters; `encoded` has the tokens."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.places import Place


@dataclass(frozen=True)
class Span:
    """A part of a rendered text that is a target, most often an assistant's turn.

    Attributes:
        start: Its first character.
        end: The end of the token that ends it.
        content: Its words as they decode without special tokens.
        trained: Whether it is to be learnt from.
        is_exact: Whether it is the template's own mark, by the rule of transformers' `return_assistant_tokens_mask`.
    """

    start: int
    end: int
    content: str
    trained: bool
    is_exact: bool = False


@dataclass(frozen=True)
class Rendered:
    """A document for `ChatTokenizer.encode`.

    Attributes:
        where: Its name in error messages.
        text: Its characters, control tokens under their secret names.
        spans: What may be a target.
        answer: The last assistant turn; None where there is none.
        completion: The parts that are the completion; None where the row is not a prompt and its completion.
        dropped: How many turns the template left out.
        is_prerendered: Whether the row was text already.
        is_literal: Whether its ids differ from `apply_chat_template`'s, since texts hold control tokens.
        wants_bos: Whether a BOS belongs in front, which the text need not hold.
        passed_over: Keys of turns that nothing reads.
        remarks: What was taken in another way than a reader may think.
    """

    where: str
    text: str
    spans: tuple[Span, ...]
    answer: Span | None = None
    completion: tuple[Span, ...] | None = None
    dropped: int = 0
    is_prerendered: bool = False
    is_literal: bool = False
    wants_bos: bool = False
    passed_over: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class GuardedText:
    """A guarded text, and the same with control tokens under their names."""

    def __init__(self, control: ControlTokens, guarded: str) -> None:
        self._control, self._guarded = control, guarded
        self.named, self._ends, self._shifts = control.named_with_shifts(guarded)

    def span(self, place: Place, trained: bool) -> Span:
        start, content_end = self._moved(place.start), self._moved(place.content_end)
        content = self._control.without_special(self.named[start:content_end])
        return Span(start, self._moved(place.end), content, trained)

    def between(self, start: int, end: int) -> Span:
        return self.span(Place(start, end, end), trained=True)

    def marked(self, start: int, end: int, off: Sequence[Place]) -> Span:
        """A part that the template marks, which is not trained on where it meets a turn that is `off`."""
        trained = not any(place.start < end and place.end > start for place in off)
        return Span(self._moved(start), self._moved(end), self._guarded[start:end], trained, is_exact=True)

    def eos(self, eos: str, last: Span) -> list[Span]:
        """The eos token at the end of the text, where nothing but blanks stands between it and the last turn."""
        name = self._control.named(eos) if eos else ""
        stem = self.named.rstrip()
        start = len(stem) - len(name)
        if not name or not stem.endswith(name) or start < last.end or self.named[last.end : start].strip():
            return []
        return [Span(start, len(stem), "", True)]

    def _moved(self, position: int) -> int:
        """Where a place of the guarded text lies in the named one."""
        index = bisect_right(self._ends, position)
        return position + (self._shifts[index - 1] if index else 0)
