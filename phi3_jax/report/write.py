"""report.html: what a run or an evaluation was, and what came of it, in one file that loads nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.report.answers import Sample, answers_section
from phi3_jax.report.chart import Series, line_chart
from phi3_jax.report.comparison import comparison, results
from phi3_jax.report.data_section import data_section, points, speed_section
from phi3_jax.report.parts import last_name, section, table, text, value_text, write_page


def write_report(
    path: str | Path,
    *,
    run_config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    samples: Sequence[Mapping[str, str]],
    data_stats: Mapping[str, Any],
    parameter_table: Sequence[tuple[str, int]],
    versions: Mapping[str, str],
    command: str,
    train_results: Mapping[str, Any] | None = None,
    memory: Mapping[str, int | None] | None = None,
) -> None:
    """Writes the report of a training run, under a temporary name first.

    **Arguments**
    - `run_config`: `RunConfig.to_dict()`. `history`: the lines of metrics.jsonl.
    - `before`, `after`: figures by name (`eval_loss`, `exact_match` ...), each where it was measured;
      beside one, `<name>_interval` (low, high), and in `after` `<name>_p_value` of the change. None
      without evaluation rows.
    - `samples`: `prompt`, `reference`, and the answers `before` and `after` training.
    - `data_stats`: counts, or one mapping of counts for each set of rows (`train`, `eval`), as of
      `DataStats.to_dict()`.
    - `parameter_table`: (module, trainable parameters). `command`: what reproduces the run.
    - `train_results`: `train_runtime` in seconds and `train_tokens`. `memory`: `host_peak_bytes` and
      `device_peak_bytes`.
    """
    model = str(run_config.get("model", {}).get("name_or_path") or "model")
    data = str(run_config.get("data", {}).get("train") or "data")
    answers = [Sample.of(row, (row.get("before", ""), row.get("after", ""))) for row in samples]
    write_page(
        path,
        title=f"{last_name(model)} on {last_name(data)}",
        kind="Full fine-tuning" if run_config.get("peft", {}).get("full_finetuning") else "LoRA fine-tuning",
        introduction=f'<p class="paths">{text(model)}<br>{text(data)}</p>\n{_facts(run_config, parameter_table)}',
        sections=[
            results(before, after),
            _curves(history),
            answers_section("Answers before and after", ("Before", "After"), answers),
            data_section(data_stats),
            '<div class="columns">\n<div class="stack">',
            speed_section(history, train_results or {}, memory or {}),
            section("Trainable parameters", _parameters(parameter_table)),
            "</div>",
            section("Versions", table(versions.items())),
            "</div>",
            _configuration(run_config),
            section("Reproduce", _command(command)),
        ],
    )


def write_evaluation_report(
    path: str | Path,
    *,
    title: str,
    columns: Sequence[str],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    command: str,
    versions: Mapping[str, str],
    data_stats: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report of an evaluation of one or several models, the first of which is the base.

    **Arguments**
    - `columns`: the models' names.
    - `metrics`: for each a `name` and its `values`, one a column, None where it was not measured; and
      where known `intervals`, (low, high) or None each, and `p_values`, None or that of the difference
      from the first column.
    - `samples`: `prompt`, `reference` and `answers`, one a column; `right`, one bool a column, where
      being right is something else than being equal to the reference.
    - `data_stats`: as in `write_report`.
    """
    answers = [Sample.of(row, row["answers"]) for row in samples]
    write_page(
        path,
        title=title,
        kind="Evaluation",
        introduction="",
        sections=[
            comparison(columns, metrics),
            answers_section("Answers", columns, answers),
            data_section(data_stats or {}),
            section("Versions", table(versions.items())),
            section("Reproduce", _command(command)),
        ],
    )


def _facts(run_config: Mapping[str, Any], parameter_table: Sequence[tuple[str, int]]) -> str:
    """One line on how it was trained."""
    peft, training = run_config.get("peft", {}), run_config.get("training", {})
    model = run_config.get("model", {})
    facts = []
    if not peft.get("full_finetuning") and peft.get("r"):
        targets = value_text(peft.get("target_modules") or "")
        facts.append(f"rank {peft['r']}, α {value_text(peft.get('lora_alpha'))} on {targets}")
    if parameter_table:
        facts.append(f"{sum(count for _, count in parameter_table):,} trainable parameters")
    if model.get("dtype"):
        facts.append(f"base in {model.get('quantization') or model['dtype']}")
    if training.get("optim"):
        facts.append(f"{training['optim']} at {value_text(training.get('learning_rate'))}")
    return f'<p class="facts">{text(" · ".join(facts))}</p>' if facts else ""


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    charts = (
        (
            "Loss",
            True,
            [
                Series("training", "train", points(history, "loss")),
                Series("evaluation", "eval", points(history, "eval_loss")),
            ],
        ),
        ("Token accuracy", False, [Series("evaluation", "eval", points(history, "eval_token_accuracy"))]),
        ("Learning rate", False, [Series("learning rate", "rate", points(history, "learning_rate"))]),
        ("Gradient norm", True, [Series("gradient norm", "train", points(history, "grad_norm"))]),
    )
    figures = []
    for heading, log, series in charts:
        svg = line_chart(series, x_label="step", y_label=heading, log=log)
        if svg:
            key = "".join(
                f'<span class="key {s.style}">{s.name}</span>' for s in series if len(series) > 1 and s.points
            )
            scale = '<span class="key plain">logarithmic</span>' if "logarithmic" in svg else ""
            figures.append(f"<figure>\n<figcaption><h2>{heading}</h2>{key}{scale}</figcaption>\n{svg}\n</figure>")
    return f'<div class="columns">\n{chr(10).join(figures)}\n</div>' if figures else ""


def _parameters(rows: Sequence[tuple[str, int]]) -> str:
    return table([*rows, ("total", sum(count for _, count in rows))]) if rows else ""


def _command(command: str) -> str:
    return f"<pre>{text(command)}</pre>" if command else ""


def _configuration(run_config: Mapping[str, Any]) -> str:
    parts = []
    for name, values in run_config.items():
        content = table(values.items()) if isinstance(values, Mapping) else f"<p>{text(value_text(values))}</p>"
        parts.append(f"<details>\n<summary>{text(name)}</summary>\n{content}\n</details>")
    return section("Configuration", "\n".join(parts))
