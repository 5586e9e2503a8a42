"""A report's data: counts, lengths, what the positions hold; and the speed and memory of the run."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.report.chart import Bar, bar_chart, share_bar
from phi3_jax.report.parts import (
    bytes_text,
    columns_table,
    last_name,
    seconds_text,
    section,
    table,
    text,
    value_text,
    words,
)


def data_section(stats: Mapping[str, Any]) -> str:
    """Sets of rows side by side, a column each; or plain counts."""
    sets = {name: value for name, value in stats.items() if isinstance(value, Mapping)}
    plain = table((words(name), value) for name, value in stats.items() if not isinstance(value, Mapping))
    rows = {name: _rows(value) for name, value in sets.items()}
    names = list(dict.fromkeys(key for value in rows.values() for key in value))
    counts = columns_table(
        list(sets), ((name, [text(value.get(name, "")) for value in rows.values()]) for name in names), "Data"
    )
    notices = [(name, notice) for name, value in sets.items() for notice in value.get("notices") or ()]
    notes = "".join(f'<p class="note">{text(name)}: {text(notice)}</p>' for name, notice in notices)
    figures = "\n".join(draw(name, value) for draw in (_lengths, _shares) for name, value in sets.items())
    charts = f'<div class="columns">\n{figures}\n</div>' if figures.strip() else ""
    return section("Data", "\n".join(part for part in (counts, plain, notes, charts) if part))


def _rows(stats: Mapping[str, Any]) -> dict[str, str]:
    """What is said of a set, by name: its counts, shares where both counts are known, and all else as it is."""
    rows: dict[str, str] = {}
    for name, value in stats.items():
        if name in ("lengths", "notices"):
            continue
        if name == "sources" and isinstance(value, list | tuple):
            rows["sources"] = ", ".join(last_name(str(source)) for source in value)
        elif name == "packing_efficiency":
            rows["positions used by packing"] = "not packed" if value is None else f"{value:.1%}"
        elif name == "target_tokens" and stats.get("tokens"):
            share = value / stats["tokens"]
            rows["tokens trained on"] = f"{value:,} ({share:.1%})"
            rows["masked out of the loss"] = f"{stats['tokens'] - value:,} ({1 - share:.1%})"
        elif name == "truncated" and stats.get("rows"):
            rows["rows cut at max_length"] = f"{value:,} ({value / stats['rows']:.1%})"
        elif name == "skipped":
            rows["rows left out, nothing to train on"] = f"{value:,}"
        elif name == "longest":
            rows["longest, in tokens"] = f"{value:,}"
        elif name == "dropped_turns":
            rows["system turns without a place"] = f"{value:,}"
        else:
            rows[words(name)] = value_text(value)
    return rows


def _lengths(name: str, stats: Mapping[str, Any]) -> str:
    lengths = stats.get("lengths")
    if not lengths or not lengths["counts"]:
        return ""
    edges = lengths["edges"]
    bars = [
        Bar(low, high, count, "train", f"{low:,} to {high - 1:,} tokens: {count:,} rows")
        for low, high, count in zip(edges[:-1], edges[1:], lengths["counts"], strict=True)
    ]
    key = ""
    if cut := stats.get("truncated"):
        width = edges[-1] - edges[-2]
        bars.append(Bar(edges[-1], edges[-1] + width, cut, "eval", f"longer, and cut: {cut:,} rows"))
        key = '<span class="key eval">longer, and cut</span>'
    svg = bar_chart(bars, x_label="tokens in a row", y_label="rows")
    return f"<figure>\n<figcaption><h3>Lengths, {text(name)}</h3>{key}</figcaption>\n{svg}\n</figure>"


def _shares(name: str, stats: Mapping[str, Any]) -> str:
    """Which part of what a step computes on is trained on."""
    tokens, targets = stats.get("tokens"), stats.get("target_tokens")
    if not tokens or targets is None:
        return ""
    held = stats.get("packing_efficiency") or 1.0
    shares = {"trained on": ("train", targets / tokens * held), "masked": ("soft", (1 - targets / tokens) * held)}
    if held < 1:
        shares["padding"] = ("none", 1 - held)
    keys = "".join(f'<span class="key {style}">{label} {share:.1%}</span>' for label, (style, share) in shares.items())
    svg = share_bar([(style, share) for style, share in shares.values()], f"What the positions of {name} hold")
    return f"<figure>\n<figcaption><h3>Positions, {text(name)}</h3>{keys}</figcaption>\n{svg}\n</figure>"


def points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A figure's course: (step, value) of every line of metrics.jsonl that has it."""
    return [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float) and "step" in row]


def speed_section(
    history: Sequence[Mapping[str, Any]], train_results: Mapping[str, Any], memory: Mapping[str, int | None]
) -> str:
    """Steps, tokens, time and the most memory, each where it is known."""
    rows: list[tuple[str, Any]] = []
    steps = [step for step, _ in points(history, "loss")]
    if steps:
        rows.append(("steps", max(steps)))
    if (seconds := train_results.get("train_runtime")) is not None:
        rows.append(("time on steps", seconds_text(seconds)))
    if (tokens := train_results.get("train_tokens")) is not None:
        rows.append(("tokens computed on", tokens))
    for name, heading, form in (
        ("tokens_per_second", "tokens a second (median)", "{:,.0f}"),
        ("mfu", "model FLOP utilisation (median)", "{:.1%}"),
    ):
        if values := [value for _, value in points(history, name)]:
            rows.append((heading, form.format(statistics.median(values))))
    for name, heading in (("host_peak_bytes", "host memory, peak"), ("device_peak_bytes", "device memory, peak")):
        if (peak := memory.get(name)) is not None:
            rows.append((heading, bytes_text(peak)))
    return section("Speed and memory", table(rows))
