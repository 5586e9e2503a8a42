"""Charts as SVG text, for a page that loads nothing. Colours come from the page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 48  # margins, for the tick labels
MARKERS = 40  # lines of up to so many points show each of them
WIDE = 100.0  # largest over smallest value, from where a line is told apart from zero on a log scale only

Place = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A named line. **Fields**: `style`, its class in the page's style; `points`, (x, y) pairs."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar from `low` to `high`. **Fields**: `style`, its class; `title`, what pointing at it shows."""

    low: float
    high: float
    count: int
    style: str
    title: str


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, log: bool = False) -> str:
    """An `<svg>` of the lines with axes, ticks and labels, or "" where there is nothing to draw.

    Points that are not finite (a diverged loss) are left out. With `log` the y axis is logarithmic,
    where all values are positive and the largest is at least `WIDE` times the smallest.
    """
    lines = [Series(s.name, s.style, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    log = log and lowest > 0 and highest >= WIDE * lowest
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = log_ticks(lowest, highest) if log else ticks(lowest, highest)
    x_at = _scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_at = _scale(y_ticks, HEIGHT - BOTTOM, TOP, log=log)
    names = ", ".join(line.name for line in lines if line.points)
    scale = ", on a logarithmic scale" if log else ""
    parts = _frame(x_ticks, y_ticks, x_at, y_at, x_label, f"{y_label} by {x_label}{scale}: {names}")
    for line in lines:
        where = [(f"{x_at(x):.1f}", f"{y_at(y):.1f}") for x, y in line.points]
        parts.append(f'<polyline class="{line.style}" points="{" ".join(",".join(p) for p in where)}"/>')
        if len(where) <= MARKERS:
            for (x, y), (x_text, y_text) in zip(line.points, where, strict=True):
                title = escape(f"{x_label} {x:,.6g}: {line.name} {y:.5g}")
                parts.append(
                    f'<circle class="{line.style}" cx="{x_text}" cy="{y_text}" r="3"><title>{title}</title></circle>'
                )
    return "\n".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[Bar], *, x_label: str, y_label: str) -> str:
    """An `<svg>` of bars side by side over a numeric axis, or "" without bars."""
    if not bars:
        return ""
    low, high = min(bar.low for bar in bars), max(bar.high for bar in bars)
    x_ticks = ticks(low, high, whole=True)
    y_ticks = ticks(0, max(1, *(bar.count for bar in bars)), whole=True)
    x_at = _scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_at = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = _frame(x_ticks, y_ticks, x_at, y_at, x_label, f"{y_label} by {x_label}, from {low:,} to {high:,}")
    for bar in bars:
        left, right, top = x_at(bar.low), x_at(bar.high), y_at(bar.count)
        gap = min(1.0, (right - left) / 4)
        parts.append(
            f'<rect class="{bar.style}" x="{left + gap / 2:.1f}" y="{top:.1f}" width="{right - left - gap:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(bar.title)}</title></rect>'
        )
    return "\n".join([*parts, "</svg>"])


def share_bar(shares: Sequence[tuple[str, float]], label: str) -> str:
    """One bar of parts that sum up to 1, each a (class, share)."""
    parts = [f'<svg class="shares" viewBox="0 0 {WIDTH} 18" role="img" aria-label="{escape(label)}">']
    left = 0.0
    for style, share in shares:
        parts.append(f'<rect class="{style}" x="{left:.1f}" y="0" width="{share * WIDTH:.1f}" height="18"/>')
        left += share * WIDTH
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers, evenly apart, that enclose `low` and `high`."""
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
    """ "1,200", "0.25", "8e-5" """
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):.4g}e{int(exponent)}"
    return f"{value:,.6g}"


def _scale(marks: Sequence[float], start: float, end: float, *, log: bool = False) -> Place:
    """Where a value lies between `start` and `end`, which are those of the first and the last tick."""

    def along(value: float) -> float:
        return math.log10(value) if log else value

    first, last = along(marks[0]), along(marks[-1])
    return lambda value: start + (along(value) - first) / (last - first) * (end - start)


def _frame(
    x_ticks: Sequence[float], y_ticks: Sequence[float], x_at: Place, y_at: Place, x_label: str, label: str
) -> list[str]:
    """The picture without its contents, to be closed by `</svg>`."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{tick_label(y)}</text>')
    axis = HEIGHT - BOTTOM
    for x in x_ticks:
        parts.append(f'<text x="{x_at(x):.1f}" y="{axis + 20}" text-anchor="middle">{tick_label(x)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return parts
