"""Charts: where each point, bar and tick of a picture lies. `templates/charts.html` draws them as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Plot:
    """A picture's size and the edges of its plot, in SVG's units; the margins are for the tick labels."""

    width: int = 480
    height: int = 250
    left: int = 62
    right: int = 454
    top: int = 12
    bottom: int = 202


PLOT = Plot()
MARKERS = 40  # lines of up to so many points show each of them
WIDE = 100.0  # largest over smallest value, from where a line is told apart from zero on a log scale only

Place = Callable[[float], float]
Interval = tuple[float, float]


class Series(NamedTuple):
    """A named line: its class in the style sheet, and (x, y) pairs."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar from `low` to `high`: its height, its class in the style sheet, and what pointing at it shows."""

    low: float
    high: float
    count: int
    style: str
    title: str


class Tick(NamedTuple):
    """A mark of an axis."""

    at: float
    label: str


class Line(NamedTuple):
    """A series as it is drawn: its path, and, where points are shown, (x, y, what pointing at it shows) of each."""

    name: str
    style: str
    path: str
    points: list[tuple[float, float, str]]


class Box(NamedTuple):
    """A rectangle, by its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    style: str
    title: str


class Chart(NamedTuple):
    """The ticks of both axes and what they frame; `label` says what it shows."""

    x: list[Tick]
    y: list[Tick]
    x_label: str
    label: str
    lines: Sequence[Line] = ()
    boxes: Sequence[Box] = ()
    is_log: bool = False


class Share(NamedTuple):
    """A part of a bar of shares."""

    x: float
    width: float
    style: str
    label: str


class ShareBar(NamedTuple):
    """One bar of parts that sum up to 1, and what it shows in words."""

    shares: list[Share]
    label: str


class Dot(NamedTuple):
    """A value on its interval; places from 6 to 194."""

    at: float
    interval: Interval | None
    style: str


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, log: bool = False) -> Chart | None:
    """Lines with axes and ticks, or None where there is nothing to draw.

    Points that are not finite (a diverged loss) are left out.

    Args:
        series: The lines.
        x_label: What the horizontal axis measures.
        y_label: What the vertical axis measures.
        log: Make the vertical axis logarithmic, where all values are positive and the largest is at least `WIDE`
            times the smallest.
    """
    finite = [Series(s.name, s.style, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for line in finite for point in line.points]
    if not points:
        return None
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    log = log and lowest > 0 and highest >= WIDE * lowest
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = log_ticks(lowest, highest) if log else ticks(lowest, highest)
    x_at = _scale(x_ticks, PLOT.left, PLOT.right)
    y_at = _scale(y_ticks, PLOT.bottom, PLOT.top, log=log)
    lines = []
    for line in finite:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        shown = line.points if len(line.points) <= MARKERS else []
        titled = [(x_at(x), y_at(y), f"{x_label} {x:,.6g}: {line.name} {y:.5g}") for x, y in shown]
        lines.append(Line(line.name, line.style, path, titled))
    names = ", ".join(line.name for line in lines if line.path)
    scale = ", on a logarithmic scale" if log else ""
    label = f"{y_label} by {x_label}{scale}: {names}"
    return Chart(_ticks(x_ticks, x_at), _ticks(y_ticks, y_at), x_label, label, lines=lines, is_log=log)


def bar_chart(bars: Sequence[Bar], *, x_label: str, y_label: str) -> Chart | None:
    """Bars side by side over a numeric axis, or None without bars."""
    if not bars:
        return None
    low, high = min(bar.low for bar in bars), max(bar.high for bar in bars)
    x_ticks = ticks(low, high, whole=True)
    y_ticks = ticks(0, max(1, *(bar.count for bar in bars)), whole=True)
    x_at = _scale(x_ticks, PLOT.left, PLOT.right)
    y_at = _scale(y_ticks, PLOT.bottom, PLOT.top)
    boxes = []
    for bar in bars:
        left, right, top = x_at(bar.low), x_at(bar.high), y_at(bar.count)
        gap = min(1.0, (right - left) / 4)
        boxes.append(Box(left + gap / 2, top, right - left - gap, PLOT.bottom - top, bar.style, bar.title))
    label = f"{y_label} by {x_label}, from {low:,} to {high:,}"
    return Chart(_ticks(x_ticks, x_at), _ticks(y_ticks, y_at), x_label, label, boxes=boxes)


def share_bar(parts: Sequence[tuple[str, str, float]], label: str) -> ShareBar:
    """One bar of parts that sum up to 1, each a (style, name, share)."""
    shares: list[Share] = []
    left = 0.0
    for style, name, share in parts:
        shares.append(Share(left, share * PLOT.width, style, f"{name} {share:.1%}"))
        left += share * PLOT.width
    return ShareBar(shares, label)


def dots(marks: Sequence[tuple[float, Interval | None, str]], low: float, high: float) -> list[Dot]:
    """Each (value, interval, style) as a dot on its interval, between `low` and `high`."""

    def at(x: float) -> float:
        return round(6 + 188 * (min(max(x, low), high) - low) / (high - low), 1)

    return [
        Dot(at(value), (at(ends[0]), at(ends[1])) if ends and all(map(math.isfinite, ends)) else None, style)
        for value, ends, style in marks
    ]


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers, evenly apart, that enclose `low` and `high`.

    Example:
        >>> ticks(10, 990)
        [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]
    """
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, up to about six, that enclose `low` and `high`, both positive."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, math.ceil((last - first) / 6))
    return [10.0**power for power in range(first, last + step, step)]


def tick_label(value: float) -> str:
    """A tick's value: "1,200", "0.25", "8e-5"."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):.4g}e{int(exponent)}"
    return f"{value:,.6g}"


def _ticks(values: Sequence[float], at: Place) -> list[Tick]:
    return [Tick(at(value), tick_label(value)) for value in values]


def _scale(marks: Sequence[float], start: float, end: float, *, log: bool = False) -> Place:
    """Where a value lies between `start` and `end`, which are those of the first and the last tick."""

    def along(value: float) -> float:
        return math.log10(value) if log else value

    first, last = along(marks[0]), along(marks[-1])
    return lambda value: start + (along(value) - first) / (last - first) * (end - start)
