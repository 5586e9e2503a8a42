"""Spans that lie between two control tokens: these tell which tokens a span holds, without a look at characters.

Most turns are such spans, and the tokenizers library is faster by a third where it keeps no characters.
"""

from bisect import bisect_right
from collections.abc import Mapping

from phi3_jax.data.control_tokens import ControlTokens
from phi3_jax.data.spans import Rendered

# By where spans begin and end: the numbers, in the text, of the control tokens before each and at its end.
Delimiters = Mapping[tuple[int, int], tuple[int, int]]
_BLANKS = " \t\r\n"  # that every reader takes for such


def delimiters(document: Rendered, control: ControlTokens) -> Delimiters | None:
    """The control tokens around all spans of a document; None where characters have to be looked at.

    Args:
        document: With spans that begin behind a control token and end with one, or not.
        control: Those of its tokenizer.

    Example:
        >>> from phi3_jax import load_tokenizer
        >>> from phi3_jax.data.spans import Span
        >>> from phi3_jax.demo import demo_path
        >>> control = ControlTokens(load_tokenizer(demo_path("base")))
        >>> opening, ending = control.named("<|assistant|>"), control.named("<|end|>")
        >>> text, start = f"{opening}four{ending}", len(opening)
        >>> end = len(text)
        >>> delimiters(Rendered("row 1", text, (Span(start, end, "four", True),)), control) == {(start, end): (0, 1)}
        True
        >>> delimiters(Rendered("row 1", text, (Span(start, start + 4, "four", True),)), control) is None
        True
    """
    spans = [*document.spans, *([] if document.answer is None else [document.answer]), *(document.completion or ())]
    if not control.can_be_counted or any(span.is_exact for span in spans):
        return None
    ends, swallow = control.ends(document.text)
    number = {end: index for index, end in enumerate(ends)}
    found = {}
    for span in spans:
        before, last = bisect_right(ends, span.start) - 1, number.get(span.end)
        if last is None or not 0 <= before < last:
            return None
        between = document.text[ends[before] : span.start]
        if between and (not swallow[before] or between.strip(_BLANKS)):
            return None
        found[span.start, span.end] = before, last
    return found
