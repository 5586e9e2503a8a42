"""A report's figures: tiles of before and after, and a table of several models, with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_jax.report.parts import columns_table, section, text, words
from phi3_jax.system.numbers import is_number

Interval = tuple[float, float]

INTERVALS = "In brackets: 95% confidence intervals, by bootstrap over the rows."


def percent(value: float) -> str:
    return f"{value:.1%}"


def decimals(value: float) -> str:
    """Four decimals: losses are compared by them."""
    return f"{value:.4f}"


def number(value: float) -> str:
    """Four digits that count; thousands written out."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


@dataclass(frozen=True)
class Metric:
    """How a figure is shown. **Fields**: `form`, the number as text; `is_share`, whether it lies in [0, 1]."""

    heading: str
    form: Callable[[float], str]
    less_is_better: bool = False
    is_share: bool = False


def _share(heading: str) -> Metric:
    return Metric(heading, percent, is_share=True)


# By name, without the `eval_` that a run puts in front. Others are shown under their names.
METRICS: Mapping[str, Metric] = {
    "loss": Metric("Loss", decimals, less_is_better=True),
    "perplexity": Metric("Perplexity", number, less_is_better=True),
    "token_accuracy": _share("Token accuracy"),
    "exact_match": _share("Exact match"),
    "normalized_match": _share("Normalized match"),
    "accuracy": _share("Accuracy"),
    "macro_f1": Metric("Macro F1", decimals, is_share=True),
    "numeric_match": _share("Numeric match"),
    "regex_match": _share("Regular expression"),
    "json_schema": _share("JSON schema"),
    "rouge1": Metric("ROUGE-1", decimals, is_share=True),
    "rouge2": Metric("ROUGE-2", decimals, is_share=True),
    "rougeL": Metric("ROUGE-L", decimals, is_share=True),
    "rougeLsum": Metric("ROUGE-Lsum", decimals, is_share=True),
    "bleu": Metric("BLEU", number),
    "chrf": Metric("chrF", number),
}


def metric(name: str) -> Metric:
    return METRICS.get(name.removeprefix("eval_")) or Metric(words(name), number)


def results(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """A tile for each metric: after training, and before it where that was measured."""
    before, after = before or {}, after or {}
    names = [name for name in after if not name.endswith(("_interval", "_p_value")) and _is_number(after[name])]
    order = list(METRICS)
    names.sort(key=lambda n: order.index(n.removeprefix("eval_")) if metric(n) in METRICS.values() else len(order))
    tiles = "\n".join(_tile(name, before, after) for name in names)
    note = ""
    if any(f"{name}_interval" in after for name in names):
        note = f'<p class="note">{INTERVALS}</p>'
    return section("Before and after, on the evaluation rows", f'<div class="tiles">{tiles}</div>{note}' * bool(tiles))


def _tile(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    shown = metric(name)
    values = [figures[name] for figures in (before, after) if _is_number(figures.get(name))]
    intervals = [figures.get(f"{name}_interval") for figures in (before, after) if _is_number(figures.get(name))]
    parts = [f"<h3>{text(shown.heading)}</h3>", f'<p class="number">{text(shown.form(after[name]))}</p>']
    if intervals[-1] is not None:
        parts.append(f'<p class="interval">{text(_range(shown, intervals[-1]))}</p>')
    if len(values) == 2:
        gain = (values[0] - values[1]) * (1 if shown.less_is_better else -1)
        state = "better" if gain > 0 else "worse" if gain < 0 else "same"
        arrow = "↑ " if values[1] > values[0] else "↓ " if values[1] < values[0] else ""
        parts.append(f'<p class="note {state}">{arrow}before {text(shown.form(values[0]))}</p>')
        p = after.get(f"{name}_p_value")
        beside = [_range(shown, intervals[0])] if intervals[0] is not None else []
        beside += [_chance(p)] if p is not None and _is_number(p) else []
        if beside:
            parts.append(f'<p class="interval">{text(" · ".join(beside))}</p>')
    if any(interval is not None for interval in intervals):
        low, high = _scale(shown, values, intervals)
        styles = ("quiet", "train")[-len(values) :]
        parts.append(strip(list(zip(values, intervals, styles, strict=True)), low, high))
    return f'<div class="tile">{"".join(parts)}</div>'


def comparison(columns: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> str:
    """A row for each metric, a column for each model; the best value of a row stands out."""
    rows = []
    for row in metrics:
        shown = metric(row["name"])
        values = list(row["values"])
        intervals = list(row.get("intervals") or [None] * len(columns))
        chances = list(row.get("p_values") or [None] * len(columns))
        finite = [value for value in values if _is_number(value)]
        best = (min if shown.less_is_better else max)(finite, default=None)
        low, high = _scale(shown, finite, intervals)
        cells = []
        for value, interval, chance in zip(values, intervals, chances, strict=True):
            if not _is_number(value):
                cells.append('<span class="quiet">not measured</span>')
                continue
            style = "value best" if value == best and min(finite) < max(finite) else "value"
            cell = [f'<span class="{style}">{text(shown.form(value))}</span>']
            if interval is not None:
                cell.append(f'<span class="interval">{text(_range(shown, interval))}</span>')
                cell.append(strip([(value, interval, "train")], low, high))
            if _is_number(chance):
                cell.append(f'<span class="interval">{text(_chance(chance))}</span>')
            cells.append("".join(cell))
        rows.append((shown.heading, cells))
    content = columns_table(columns, rows, "Results")
    notes = []
    if any(row.get("intervals") for row in metrics):
        notes.append(INTERVALS)
    if any(p is not None for row in metrics for p in row.get("p_values") or ()):
        notes.append(f"p: of the difference from {columns[0]}, paired by row.")
    return section("Results", content + "".join(f'<p class="note">{text(note)}</p>' for note in notes) * bool(content))


def strip(marks: Sequence[tuple[float, Interval | None, str]], low: float, high: float) -> str:
    """Each value as a dot on its interval, one below the other, between `low` and `high`."""
    height = 12 * len(marks)
    parts = [f'<svg class="strip" viewBox="0 0 200 {height}" aria-hidden="true">']

    def at(x: float) -> float:
        return round(6 + 188 * (min(max(x, low), high) - low) / (high - low), 1)

    for index, (value, interval, style) in enumerate(marks):
        y = 6 + 12 * index
        parts.append(f'<line class="track" x1="6" x2="194" y1="{y}" y2="{y}"/>')
        if interval is not None and all(map(math.isfinite, interval)):
            parts.append(f'<line class="{style}" x1="{at(interval[0])}" x2="{at(interval[1])}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="{style}" cx="{at(value)}" cy="{y}" r="4"/>')
    return "".join([*parts, "</svg>"])


def _scale(shown: Metric, values: Sequence[float], intervals: Sequence[Interval | None]) -> Interval:
    """What a strip spans: everything between 0 and 1 for shares, else a little more than is drawn."""
    if shown.is_share:
        return 0.0, 1.0
    ends = [end for interval in intervals if interval is not None for end in interval]
    all_values = [x for x in (*values, *ends) if math.isfinite(x)] or [0.0]
    low, high = min(all_values), max(all_values)
    spread = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    return low - spread, high + spread


def _range(shown: Metric, interval: Interval) -> str:
    return f"[{shown.form(interval[0])}, {shown.form(interval[1])}]"


def _chance(p: float) -> str:
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return shown.replace(" ", "\u00a0")  # not to be parted at a line's end


def _is_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
