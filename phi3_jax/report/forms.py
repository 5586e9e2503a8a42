"""How values are written for people: names, counts, sizes, times, and the figures of an evaluation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial


def words(name: str) -> str:
    """A name as words: `"token_accuracy"` is "token accuracy"."""
    return name.replace("_", " ")


def last_name(path: str) -> str:
    """The last part of a path or hub id."""
    return path.rstrip("/\\").replace("\\", "/").split("/")[-1] or path


def value_text(value: object) -> str:
    """A plain value as it is read in a table.

    Example:
        >>> value_text([1234567, 0.000125, True, None])
        '1,234,567, 0.000125, true, null'
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


def bytes_text(count: float) -> str:
    """Bytes in a unit that suits them: "3.46 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def seconds_text(seconds: float) -> str:
    """A time in units that suit it: "12.3 s", "4 min 05 s", "3 h 07 min"."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def number(value: float, *, digits: int = 4) -> str:
    """As many significant digits; thousands written out."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def p_value_text(p: float) -> str:
    """A p-value without its name: "<0.001", "0.031"."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class Form:
    """How a figure is shown, and which way is better.

    Attributes:
        heading: What it is called.
        write: The value as text.
        less_is_better: Whether a lower value is the better one.
        is_share: Whether it lies between 0 and 1.
    """

    heading: str
    write: Callable[[float], str]
    less_is_better: bool = False
    is_share: bool = False

    def signed(self, difference: float) -> str:
        """A difference of two values, with its sign."""
        text = self.write(difference)
        return text if text.startswith(("-", "nan")) else f"+{text}"


_percent, _four_decimals, _two_decimals = "{:.1%}".format, "{:.4f}".format, "{:.2f}".format

# By name, without the `eval_` that a run puts in front.
FORMS: Mapping[str, Form] = {
    "loss": Form("Loss", _four_decimals, less_is_better=True),
    "perplexity": Form("Perplexity", partial(number, digits=5), less_is_better=True),
    "token_accuracy": Form("Token accuracy", _percent, is_share=True),
    "exact_match": Form("Exact match", _percent, is_share=True),
    "normalized_match": Form("Normalized match", _percent, is_share=True),
    "accuracy": Form("Accuracy", _percent, is_share=True),
    "macro_f1": Form("Macro F1", _four_decimals, is_share=True),
    "numeric_match": Form("Numeric match", _percent, is_share=True),
    "regex_match": Form("Regular expression", _percent, is_share=True),
    "json_schema": Form("JSON schema", _percent, is_share=True),
    "tool_call": Form("Tool calls", _percent, is_share=True),
    "tool_call_name": Form("Names of tool calls", _percent, is_share=True),
    "tool_call_row": Form("Rows with the right tool calls", _percent, is_share=True),
    "rouge1": Form("ROUGE-1", _four_decimals, is_share=True),
    "rouge2": Form("ROUGE-2", _four_decimals, is_share=True),
    "rougeL": Form("ROUGE-L", _four_decimals, is_share=True),
    "rougeLsum": Form("ROUGE-Lsum", _four_decimals, is_share=True),
    "bleu": Form("BLEU", _two_decimals),
    "chrf": Form("chrF", _two_decimals),
}


def set_and_figure(name: str) -> tuple[str, str]:
    """Which set of evaluation rows a run's figure is of, empty where it has no name, and the figure.

    Example:
        >>> set_and_figure("eval_chats_token_accuracy"), set_and_figure("eval_loss")
        (('chats', 'token_accuracy'), ('', 'loss'))
    """
    short = name.removeprefix("eval_")
    if short == name or short in FORMS:
        return "", short
    known = max((figure for figure in FORMS if short.endswith(f"_{figure}")), key=len, default=None)
    return ("", short) if known is None else (short.removesuffix(f"_{known}"), known)


def figure_words(name: str) -> str:
    """A figure's name within a sentence: `"eval_token_accuracy"` is "token accuracy"."""
    of, figure = set_and_figure(name)
    return f"{words(figure)} of {of}" if of else words(figure)


def form_of(name: str) -> Form:
    """How a figure is shown; one that is not known, under its name.

    Args:
        name: The figure's, with or without `eval_` in front.

    Example:
        >>> form_of("eval_token_accuracy").write(0.998), form_of("loss").signed(-0.25)
        ('99.8%', '-0.2500')
        >>> form_of("eval_chats_loss").heading
        'Loss of chats'
    """
    of, figure = set_and_figure(name)
    form = FORMS.get(figure) or Form(words(name), number)
    return replace(form, heading=f"{form.heading} of {of}") if of else form
