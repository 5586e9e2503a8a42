"""Line charts as SVG text, for a page that loads nothing. Colours come from the page's style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 12, 44  # margins, for the tick labels
MARKERS = 40  # lines of up to so many points show each of them


@dataclass(frozen=True)
class Series:
    """A named line. **Fields**: `style`, its class in the page's style; `points`, (x, y) pairs."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """An `<svg>` of the lines with axes, ticks and labels, or "" where there is nothing to draw.

    Points that are not finite (a diverged loss) are left out.
    """
    lines = [Series(s.name, s.style, [p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def x_at(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    names = ", ".join(line.name for line in lines if line.points)
    label = escape(f"{y_label} by {x_label}: {names}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{tick_label(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick_label(x)}</text>')
    axis = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis}" y2="{axis}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
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


def tick_label(value: float) -> str:
    """ "1,200", "0.25", "8e-5" """
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):.4g}e{int(exponent)}"
    return f"{value:,.6g}"
