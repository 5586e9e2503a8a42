"""report.html: what a run was, and what came of it, in one file that loads nothing else."""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from phi3_jax.evaluate.chart import Series, line_chart
from phi3_jax.evaluate.style import STYLE

# name in the results, heading, how to write it, whether less is better
METRICS = (
    ("eval_loss", "Loss", "{:.4f}", True),
    ("eval_perplexity", "Perplexity", "{:.4g}", True),
    ("eval_token_accuracy", "Token accuracy", "{:.1%}", False),
    ("exact_match", "Exact match", "{:.1%}", False),
)

OPEN_SAMPLES = 6


def write_report(
    path: str | Path,
    *,
    run_config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    samples: Sequence[Mapping[str, str]],
    data_stats: Mapping[str, Any],
    parameter_table: Sequence[tuple[str, int]],
    versions: Mapping[str, str],
    command: str,
) -> None:
    """Writes the page, under a temporary name first.

    **Arguments**
    - `run_config`: `RunConfig.to_dict()`. `history`: the lines of metrics.jsonl.
    - `before`, `after`: `eval_loss`, `eval_perplexity`, `eval_token_accuracy`, `exact_match`, each
      where it was measured; None without evaluation rows.
    - `samples`: `prompt`, `reference`, and the answers `before` and `after` training.
    - `data_stats`: counts, or one mapping of counts for each set of rows (`train`, `eval`).
    - `parameter_table`: (module, trainable parameters). `command`: what reproduces the run.
    """
    model = str(run_config.get("model", {}).get("name_or_path") or "model")
    data = str(run_config.get("data", {}).get("train") or "data")
    full = run_config.get("peft", {}).get("full_finetuning")
    title = f"{_last_name(model)} on {_last_name(data)}"
    sections = [
        _results(before, after),
        _curves(history),
        _samples(samples),
        '<div class="columns">',
        _section("Data", _data(data_stats)),
        _section("Trainable parameters", _parameters(parameter_table)),
        _section("Speed", _speed(history)),
        _section("Versions", _table(versions.items())),
        "</div>",
        _configuration(run_config),
        _section("Reproduce", f"<pre>{_text(command)}</pre>" if command else ""),
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kind">{"Full fine-tuning" if full else "LoRA fine-tuning"}</p>
<h1>{_text(title)}</h1>
<p class="paths">{_text(model)}<br>{_text(data)}</p>
</header>
{chr(10).join(section for section in sections if section)}
</main>
</body>
</html>
"""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    # A lone surrogate, which a model's cut-off answer can hold, has no UTF-8.
    temporary.write_text(page, encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def _text(value: Any) -> str:
    """Safe in HTML's text and attributes; control characters, which HTML forbids, made visible."""
    text = escape(str(value))
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 159 else f"\\x{ord(c):02x}" for c in text)


def _last_name(path: str) -> str:
    return path.rstrip("/\\").replace("\\", "/").split("/")[-1] or path


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>" if content else ""


def _table(rows: Iterable[tuple[Any, Any]]) -> str:
    body = "\n".join(f"<tr><th>{_text(name)}</th><td>{_text(_value(value))}</td></tr>" for name, value in rows)
    return f"<table>\n{body}\n</table>" if body else ""


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


def _results(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> str:
    """A tile for each metric: after training, and before it where that was measured."""
    before, after = before or {}, after or {}
    tiles = []
    for name, heading, form, less_is_better in METRICS:
        if after.get(name) is None:
            continue
        note = ""
        if before.get(name) is not None:
            gain = (before[name] - after[name]) * (1 if less_is_better else -1)
            state = "better" if gain > 0 else "worse" if gain < 0 else "same"
            note = f'<p class="note {state}">before {_text(form.format(before[name]))}</p>'
        value = _text(form.format(after[name]))
        tiles.append(f'<div class="tile"><h3>{heading}</h3><p class="number">{value}</p>{note}</div>')
    if not tiles:
        return ""
    return _section("On the evaluation rows, after training", f'<div class="tiles">{"".join(tiles)}</div>')


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float) and "step" in row]


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    charts = (
        (
            "Loss",
            [
                Series("training", "train", _points(history, "loss")),
                Series("evaluation", "eval", _points(history, "eval_loss")),
            ],
        ),
        ("Learning rate", [Series("learning rate", "rate", _points(history, "learning_rate"))]),
    )
    figures = []
    for heading, series in charts:
        svg = line_chart(series, x_label="step", y_label=heading)
        if svg:
            key = "".join(
                f'<span class="key {s.style}">{s.name}</span>' for s in series if len(series) > 1 and s.points
            )
            figures.append(f"<figure>\n<figcaption><h2>{heading}</h2>{key}</figcaption>\n{svg}\n</figure>")
    return f'<section class="columns">\n{chr(10).join(figures)}\n</section>' if figures else ""


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    """The first answers open, the others folded away."""
    cards = []
    for sample in samples:
        reference = str(sample.get("reference", ""))
        answers = []
        for name, heading in (("before", "Before"), ("after", "After")):
            answer = str(sample.get(name, ""))
            hit = bool(reference.strip()) and answer.strip() == reference.strip()
            mark = ' <span class="better">✓ as the reference</span>' if hit else ""
            answers.append(f'<div class="{name}"><h3>{heading}{mark}</h3><pre>{_text(answer)}</pre></div>')
        cards.append(
            f"<article>\n<h3>Prompt</h3><pre>{_text(sample.get('prompt', ''))}</pre>\n"
            f'<div class="pair">{"".join(answers)}</div>\n'
            f"<h3>Reference</h3><pre>{_text(reference)}</pre>\n</article>"
        )
    content = "\n".join(cards[:OPEN_SAMPLES])
    if rest := cards[OPEN_SAMPLES:]:
        content += f"\n<details>\n<summary>{len(rest)} more</summary>\n{chr(10).join(rest)}\n</details>"
    return _section("Answers before and after", content)


def _data(stats: Mapping[str, Any]) -> str:
    """Sets of rows side by side, a column each; or plain counts."""
    sets = {name: value for name, value in stats.items() if isinstance(value, Mapping)}
    plain = _table((_words(name), value) for name, value in stats.items() if not isinstance(value, Mapping))
    if not sets:
        return plain
    names = list(dict.fromkeys(key for value in sets.values() for key in value))
    head = "".join(f"<th>{_text(name)}</th>" for name in sets)
    body = "\n".join(
        f"<tr><th>{_text(_words(name))}</th>"
        + "".join(f"<td>{_text(_value(value[name]) if name in value else '')}</td>" for value in sets.values())
        + "</tr>"
        for name in names
    )
    return f"<table>\n<tr><td></td>{head}</tr>\n{body}\n</table>\n{plain}"


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _parameters(table: Sequence[tuple[str, int]]) -> str:
    return _table([*table, ("total", sum(count for _, count in table))]) if table else ""


def _speed(history: Sequence[Mapping[str, Any]]) -> str:
    rows: list[tuple[str, Any]] = []
    steps = [row["step"] for row in history if "loss" in row and "step" in row]
    if steps:
        rows.append(("steps", max(steps)))
    for name, heading, form in (
        ("tokens_per_second", "tokens a second (median)", "{:,.0f}"),
        ("mfu", "model FLOP utilisation (median)", "{:.1%}"),
    ):
        values = [value for _, value in _points(history, name)]
        if values:
            rows.append((heading, form.format(statistics.median(values))))
    return _table(rows)


def _configuration(run_config: Mapping[str, Any]) -> str:
    parts = []
    for section, values in run_config.items():
        content = _table(values.items()) if isinstance(values, Mapping) else f"<p>{_text(_value(values))}</p>"
        parts.append(f"<details>\n<summary>{_text(section)}</summary>\n{content}\n</details>")
    return _section("Configuration", "\n".join(parts))
