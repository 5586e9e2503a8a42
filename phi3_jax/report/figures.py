"""A report's figures: tiles of before and after, and a table of several models, with their intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, TypeGuard

from phi3_jax.report.chart import Dot, Interval, dots
from phi3_jax.report.forms import FORMS, Form, form_of, p_value_text
from phi3_jax.system.numbers import is_number

Figures = Mapping[str, object]

_BESIDE = ("_interval", "_p_value")  # what ends the names of what is said beside a figure


class Compared(TypedDict):
    """A figure of several models, the first of which is the base.

    Attributes:
        name: The figure's.
        values: One a model, None where it was not measured.
        intervals: Where known, (low, high) or None a model.
        p_values: Where known, that of the difference from the first model, or None.
    """

    name: str
    values: Sequence[float | None]
    intervals: NotRequired[Sequence[Interval | None]]
    p_values: NotRequired[Sequence[float | None]]


@dataclass(frozen=True)
class Tile:
    """A figure after training, and before it; texts are empty where it was not measured."""

    heading: str
    number: str
    interval: str
    before: str
    state: str
    beside: str
    dots: list[Dot]


@dataclass(frozen=True)
class Cell:
    """A figure of one of several models; texts are empty where nothing is known."""

    number: str
    is_best: bool
    interval: str
    dots: list[Dot]
    chance: str


def tiles(before: Figures | None, after: Figures | None) -> list[Tile]:
    """A tile for each figure: after training, and before it where that was measured."""
    before, after = before or {}, after or {}
    names = [
        name for name in after if not name.endswith(("_interval", "_p_value")) and _number(after, name) is not None
    ]
    known = list(FORMS)

    def place(name: str) -> int:
        short = name.removeprefix("eval_")
        return known.index(short) if short in known else len(known)

    return [_tile(name, before, after) for name in sorted(names, key=place)]


def _tile(name: str, before: Figures, after: Figures) -> Tile:
    form = form_of(name)
    marks = [
        (value, _interval(figures, name), style)
        for figures, style in ((before, "quiet"), (after, "train"))
        if (value := _number(figures, name)) is not None
    ]
    value, interval, _ = marks[-1]
    before_text = state = beside = ""
    if len(marks) == 2:
        old, old_interval, _ = marks[0]
        gain = (old - value) * (1 if form.less_is_better else -1)
        state = "better" if gain > 0 else "worse" if gain < 0 else "same"
        before_text = f"{'↑ ' if value > old else '↓ ' if value < old else ''}before {form.write(old)}"
        said = (_range(form, old_interval), _chance(_number(after, f"{name}_p_value")))
        beside = " · ".join(part for part in said if part)
    has_interval = any(ends is not None for _, ends, _ in marks)
    drawn = dots(marks, *_span(form, marks)) if has_interval else []
    return Tile(form.heading, form.write(value), _range(form, interval), before_text, state, beside, drawn)


def comparison(columns: Sequence[str], figures: Sequence[Compared]) -> list[tuple[str, list[Cell | None]]]:
    """A row for each figure, a cell for each model, None where it was not measured."""
    nothing = [None] * len(columns)
    rows = []
    for row in figures:
        form = form_of(row["name"])
        values, intervals = _finite(row["values"]), row.get("intervals") or nothing
        measured = [value for value in values if value is not None]
        best = (min if form.less_is_better else max)(measured, default=None)
        stands_out = len(set(measured)) > 1
        marks = [(value, ends, "train") for value, ends in zip(values, intervals, strict=True)]
        low, high = _span(form, [(value, ends, style) for value, ends, style in marks if value is not None])
        cells: list[Cell | None] = [
            None
            if value is None
            else Cell(
                form.write(value),
                stands_out and value == best,
                _range(form, ends),
                dots([(value, ends, style)], low, high) if ends is not None else [],
                _chance(p),
            )
            for (value, ends, style), p in zip(marks, _finite(row.get("p_values") or nothing), strict=True)
        ]
        rows.append((form.heading, cells))
    return rows


def _span(form: Form, marks: Sequence[tuple[float, Interval | None, str]]) -> Interval:
    """What is drawn: everything between 0 and 1 for shares, else a little more than values and intervals."""
    if form.is_share:
        return 0.0, 1.0
    everything = [x for value, ends, _ in marks for x in (value, *(ends or ())) if math.isfinite(x)] or [0.0]
    low, high = min(everything), max(everything)
    spread = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    return low - spread, high + spread


def _range(form: Form, interval: Interval | None) -> str:
    return "" if interval is None else f"[{form.write(interval[0])}, {form.write(interval[1])}]"


def _chance(p: float | None) -> str:
    if p is None:
        return ""
    text = p_value_text(p)
    # With spaces that are not to be parted at a line's end.
    return f"p\u00a0<\u00a0{text[1:]}" if text.startswith("<") else f"p\u00a0=\u00a0{text}"


def _finite(values: Sequence[float | None]) -> list[float | None]:
    return [value if _is_finite(value) else None for value in values]


def _number(figures: Figures, name: str) -> float | None:
    value = figures.get(name)
    return value if _is_finite(value) else None


def _interval(figures: Figures, name: str) -> Interval | None:
    match figures.get(f"{name}_interval"):
        case [int() | float() as low, int() | float() as high]:
            return low, high
    return None


def _is_finite(value: object) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)
