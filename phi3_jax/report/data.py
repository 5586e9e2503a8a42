"""A report's data: counts, lengths, what the positions hold; and the speed and memory of the run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.report.chart import Bar, Chart, ShareBar, bar_chart, share_bar
from phi3_jax.report.forms import bytes_text, last_name, seconds_text, value_text, words

Stats = Mapping[str, object]

NAMED = 100  # rows that are left out and named one by one


@dataclass(frozen=True)
class LeftOut:
    """Rows of a set that were not used.

    Attributes:
        name: The set's.
        count: How many there are.
        rows: Their names, each with the reason; the first of them.
        more: How many are not among these.
    """

    name: str
    count: int
    rows: list[tuple[str, str]]
    more: int


@dataclass(frozen=True)
class Data:
    """What the page shows of the data.

    Attributes:
        sets: The names of the sets of rows, a column each.
        rows: What is said of them: a name, and a text for each set.
        counts: Plain counts, by name.
        notices: What a user should know of a set.
        left_out: Of each set that left rows out, which, and why.
        lengths: For each set that knows them, its name, its lengths, and whether rows were cut.
        positions: For each set that knows it, its name, and what is trained on.
    """

    sets: list[str]
    rows: list[tuple[str, list[str]]]
    counts: list[tuple[str, str]]
    notices: list[tuple[str, str]]
    left_out: list[LeftOut]
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
        [(name, str(notice)) for name, value in sets.items() for notice in _list(value, "notices")],
        [left_out for name, value in sets.items() if (left_out := _left_out(name, value))],
        [(name, chart, bool(value.get("truncated"))) for name, value in sets.items() if (chart := _lengths(value))],
        [(name, bar) for name, value in sets.items() if (bar := _positions(name, value))],
    )


def _said(stats: Stats) -> dict[str, str]:
    """What is said of a set, by name: its counts, shares where both counts are known, and all else as it is."""
    rows: dict[str, str] = {}
    tokens, number = _count(stats, "tokens"), _count(stats, "rows")
    for name, value in stats.items():
        match name, value:
            # Shown elsewhere; remarks are among the notices.
            case (("lengths" | "notices" | "remarks" | "left_out" | "truncated_rows" | "first_literal"), _):
                pass
            # Of rows as they were always read there is nothing to say.
            case (("invalid" | "literal_rows" | "passed_over" | "formats" | "length_figures"), _) if not value:
                pass
            case (("passed_over" | "formats"), Mapping() as counts):
                rows[_HEADINGS[name]] = ", ".join(f"{key} ({value_text(count)})" for key, count in counts.items())
            case "length_figures", {"min": shortest, "median": median, "p95": most}:
                figures = tuple(map(value_text, (shortest, median, most)))
                rows["lengths, in tokens"] = "shortest {}, median {}, 95 of 100 up to {}".format(*figures)
            case "literal_rows", int():
                rows[_HEADINGS[name]] = f"{value:,}, the first {last_name(str(stats.get('first_literal')))}"
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
    "formats": "formats, and rows of each",
    "passed_over": "keys passed over, and rows that have them",
    "literal_rows": "rows that differ from apply_chat_template",
    "invalid": "rows left out, with another fault",
    "skipped": "rows left out, nothing to train on",
    "longest": "longest, in tokens",
    "dropped_turns": "system turns without a place",
}


def _count(stats: Stats, name: str) -> int:
    value = stats.get(name)
    return value if isinstance(value, int) else 0


def _list(stats: Stats, name: str) -> list[object]:
    value = stats.get(name)
    return list(value) if isinstance(value, list | tuple) else []


def _left_out(name: str, stats: Stats) -> LeftOut | None:
    rows = [(str(where), str(why)) for where, why in map(_pair, _list(stats, "left_out")[:NAMED])]
    count = max(len(rows), _count(stats, "skipped") + _count(stats, "invalid"))
    return LeftOut(name, count, rows, count - len(rows)) if rows else None


def _pair(value: object) -> tuple[object, object]:
    match value:
        case [where, why]:
            return where, why
        case _:
            return value, ""


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
