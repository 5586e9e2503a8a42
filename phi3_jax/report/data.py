"""A report's data: counts, lengths, what the positions hold; and the speed and memory of the run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.report.chart import Bar, Chart, ShareBar, bar_chart, share_bar
from phi3_jax.report.forms import bytes_text, last_name, seconds_text, value_text, words

Stats = Mapping[str, object]


@dataclass(frozen=True)
class Data:
    """What the page shows of the data.

    Attributes:
        sets: The names of the sets of rows, a column each.
        rows: What is said of them: a name, and a text for each set.
        counts: Plain counts, by name.
        notices: What a user should know of a set.
        lengths: For each set that knows them, its name, its lengths, and whether rows were cut.
        positions: For each set that knows it, its name, and what is trained on.
    """

    sets: list[str]
    rows: list[tuple[str, list[str]]]
    counts: list[tuple[str, str]]
    notices: list[tuple[str, str]]
    lengths: list[tuple[str, Chart, bool]]
    positions: list[tuple[str, ShareBar]]


def described(stats: Stats) -> Data:
    """Sets of rows side by side; or plain counts."""
    sets = {name: value for name, value in stats.items() if isinstance(value, Mapping)}
    said = {name: _said(value) for name, value in sets.items()}
    names = dict.fromkeys(key for value in said.values() for key in value)
    return Data(
        list(sets),
        [(name, [value.get(name, "") for value in said.values()]) for name in names],
        [(words(name), value_text(value)) for name, value in stats.items() if name not in sets],
        [(name, str(notice)) for name, value in sets.items() for notice in value.get("notices") or ()],
        [(name, chart, bool(value.get("truncated"))) for name, value in sets.items() if (chart := _lengths(value))],
        [(name, bar) for name, value in sets.items() if (bar := _positions(name, value))],
    )


def _said(stats: Stats) -> dict[str, str]:
    """What is said of a set, by name: its counts, shares where both counts are known, and all else as it is."""
    rows: dict[str, str] = {}
    tokens, number = _count(stats, "tokens"), _count(stats, "rows")
    for name, value in stats.items():
        match name, value:
            case (("lengths" | "notices"), _):
                pass
            case "sources", [*sources]:
                rows["sources"] = ", ".join(last_name(str(source)) for source in sources)
            case "packing_efficiency", int() | float() | None:
                rows["positions used by packing"] = "not packed" if value is None else f"{value:.1%}"
            case "target_tokens", int() if tokens:
                rows["tokens trained on"] = f"{value:,} ({value / tokens:.1%})"
                rows["masked out of the loss"] = f"{tokens - value:,} ({1 - value / tokens:.1%})"
            case "truncated", int() if number:
                rows["rows cut at max_length"] = f"{value:,} ({value / number:.1%})"
            case _:
                rows[_HEADINGS.get(name, words(name))] = value_text(value)
    return rows


_HEADINGS = {
    "skipped": "rows left out, nothing to train on",
    "longest": "longest, in tokens",
    "dropped_turns": "system turns without a place",
}


def _count(stats: Stats, name: str) -> int:
    value = stats.get(name)
    return value if isinstance(value, int) else 0


def _lengths(stats: Stats) -> Chart | None:
    match stats.get("lengths"):
        case {"edges": [*edges], "counts": [*counts]} if counts:
            pass
        case _:
            return None
    bars = [
        Bar(low, high, count, "train", f"{low:,} to {high - 1:,} tokens: {count:,} rows")
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    if cut := _count(stats, "truncated"):
        end = edges[-1] + edges[-1] - edges[-2]
        bars.append(Bar(edges[-1], end, cut, "eval", f"longer, and cut: {cut:,} rows"))
    return bar_chart(bars, x_label="tokens in a row", y_label="rows")


def _positions(name: str, stats: Stats) -> ShareBar | None:
    """Which part of what a step computes on is trained on."""
    tokens, targets = _count(stats, "tokens"), stats.get("target_tokens")
    if not tokens or not isinstance(targets, int):
        return None
    packed = stats.get("packing_efficiency")
    held = packed if isinstance(packed, float) and packed else 1.0
    shares = [("train", "trained on", targets / tokens * held), ("soft", "masked", (1 - targets / tokens) * held)]
    if held < 1:
        shares.append(("none", "padding", 1 - held))
    return share_bar(shares, f"What the positions of {name} hold")


def points(history: Sequence[Stats], name: str) -> list[tuple[float, float]]:
    """A figure's course: (step, value) of every line of metrics.jsonl that has it."""
    pairs = ((row.get("step"), row.get(name)) for row in history)
    return [(step, y) for step, y in pairs if isinstance(step, int | float) and isinstance(y, int | float)]


def speed(
    history: Sequence[Stats], train_results: Mapping[str, object], memory: Mapping[str, int | None]
) -> list[tuple[str, str]]:
    """Steps, tokens, time and the most memory, each where it is known."""
    rows: list[tuple[str, str]] = []
    steps = [step for step, _ in points(history, "loss")]
    if steps:
        rows.append(("steps", value_text(max(steps))))
    if isinstance(seconds := train_results.get("train_runtime"), int | float):
        rows.append(("time on steps", seconds_text(seconds)))
    if (tokens := train_results.get("train_tokens")) is not None:
        rows.append(("tokens computed on", value_text(tokens)))
    for name, heading, form in (
        ("tokens_per_second", "tokens a second (median)", "{:,.0f}"),
        ("mfu", "model FLOP utilisation (median)", "{:.1%}"),
    ):
        if values := [value for _, value in points(history, name)]:
            rows.append((heading, form.format(statistics.median(values))))
    for name, heading in (("host_peak_bytes", "host memory, peak"), ("device_peak_bytes", "device memory, peak")):
        if (peak := memory.get(name)) is not None:
            rows.append((heading, bytes_text(peak)))
    return rows
