"""report.html: what a run or an evaluation was, and what came of it, in one file that loads nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.report.answers import Sample, grouped
from phi3_jax.report.chart import Chart, Series, line_chart
from phi3_jax.report.data import described, points, speed
from phi3_jax.report.figures import Compared, comparison, tiles
from phi3_jax.report.forms import last_name, set_and_figure, value_text
from phi3_jax.report.page import write_page


def write_report(
    path: str | Path,
    *,
    run_config: Mapping[str, object],
    history: Sequence[Mapping[str, object]],
    before: Mapping[str, object] | None,
    after: Mapping[str, object] | None,
    samples: Sequence[Mapping[str, object]],
    data_stats: Mapping[str, object],
    parameter_table: Sequence[tuple[str, int]],
    versions: Mapping[str, str],
    command: str,
    train_results: Mapping[str, object] | None = None,
    memory: Mapping[str, int | None] | None = None,
) -> None:
    """Writes the report of a training run, whole or not at all.

    Args:
        path: The file.
        run_config: `RunConfig.to_dict()`.
        history: The lines of metrics.jsonl.
        before: Figures by name (`eval_loss`, `exact_match` ...) before training, where they were measured; beside one,
            `<name>_interval` (low, high). None without evaluation rows.
        after: The same after training, and `<name>_p_value` of the change.
        samples: `prompt`, `reference`, and the answers `before` training, if there are any, and `after`.
        data_stats: Counts, or one mapping of counts for each set of rows (`train`, `eval`), as of
            `DataStats.to_dict()`.
        parameter_table: (module, trainable parameters).
        versions: Of the packages, by name.
        command: What reproduces the run.
        train_results: `train_runtime` in seconds and `train_tokens`.
        memory: `host_peak_bytes` and `device_peak_bytes`.

    Raises:
        StorageError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(
        ...     path,
        ...     run_config={"model": {"name_or_path": "hub/base"}, "data": {"train": "chats.jsonl"}},
        ...     history=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}],
        ...     before=None,
        ...     after={"eval_loss": 1.4},
        ...     samples=[],
        ...     data_stats={},
        ...     parameter_table=[("lm_head", 100)],
        ...     versions={},
        ...     command="phi3-jax train --config run.yaml",
        ... )
        >>> "<h1>base on chats.jsonl</h1>" in path.read_text()
        True
    """
    model = str(_section(run_config, "model").get("name_or_path") or "model")
    data = str(_section(run_config, "data").get("train") or "data")
    when = ("before", "after") if any("before" in row for row in samples) else ("after",)
    answers = [Sample.of(row, [row.get(name, "") for name in when]) for row in samples]
    total = sum(count for _, count in parameter_table)
    write_page(
        path,
        "run.html",
        title=f"{last_name(model)} on {last_name(data)}",
        kind="Full fine-tuning" if _section(run_config, "peft").get("full_finetuning") else "LoRA fine-tuning",
        model=model,
        dataset=data,
        facts=_facts(run_config, total),
        tiles=tiles(before, after),
        curves=_curves(history),
        answers_when=" and ".join(when),
        answers=grouped([name.capitalize() for name in when], answers),
        data=described(data_stats),
        speed=speed(history, train_results or {}, memory or {}),
        parameters=_texts([*parameter_table, ("total", total)]) if parameter_table else [],
        versions=_texts(versions.items()),
        configuration=[
            (name, _texts(values.items()) if isinstance(values, Mapping) else value_text(values))
            for name, values in run_config.items()
        ],
        command=command,
    )


def write_evaluation_report(
    path: str | Path,
    *,
    title: str,
    columns: Sequence[str],
    metrics: Sequence[Compared],
    samples: Sequence[Mapping[str, object]],
    command: str,
    versions: Mapping[str, str],
    data_stats: Mapping[str, object] | None = None,
) -> None:
    """Writes the report of an evaluation of one or several models, the first of which is the base.

    Args:
        path: The file.
        title: The page's.
        columns: The models' names.
        metrics: The figures, each of all models.
        samples: `prompt`, `reference` and `answers`, one a column; `right`, one bool a column, where being right is
            something else than being equal to the reference.
        command: What reproduces the evaluation.
        versions: Of the packages, by name.
        data_stats: As in `write_report`.

    Raises:
        StorageError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_evaluation_report(
        ...     path,
        ...     title="orders on test.jsonl",
        ...     columns=["base", "orders"],
        ...     metrics=[{"name": "exact_match", "values": [0.25, 0.94], "p_values": [None, 0.0004]}],
        ...     samples=[{"prompt": "2 mugs?", "reference": "mugs; 2", "answers": ["Two mugs.", "mugs; 2"]}],
        ...     command="phi3-jax evaluate ...",
        ...     versions={},
        ... )
        >>> "94.0%" in path.read_text()
        True
    """
    answers = [Sample.of(row, given) for row in samples if isinstance(given := row["answers"], Sequence)]
    write_page(
        path,
        "evaluation.html",
        title=title,
        kind="Evaluation",
        columns=columns,
        rows=comparison(columns, metrics),
        answers=grouped(columns, answers),
        data=described(data_stats or {}),
        versions=_texts(versions.items()),
        command=command,
    )


def _section(run_config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = run_config.get(name)
    return section if isinstance(section, Mapping) else {}


def _texts(rows: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    return [(name, value_text(value)) for name, value in rows]


def _facts(run_config: Mapping[str, object], parameters: int) -> list[str]:
    """How it was trained, in a few words."""
    model, peft, training = (_section(run_config, name) for name in ("model", "peft", "training"))
    facts = []
    if not peft.get("full_finetuning") and peft.get("r"):
        targets = value_text(peft.get("target_modules") or "")
        facts.append(f"rank {peft['r']}, α {value_text(peft.get('lora_alpha'))} on {targets}")
    if parameters:
        facts.append(f"{parameters:,} trainable parameters")
    if model.get("dtype"):
        facts.append(f"base in {model.get('quantization') or model['dtype']}")
    if training.get("optim"):
        facts.append(f"{training['optim']} at {value_text(training.get('learning_rate'))}")
    return facts


@dataclass(frozen=True)
class _Curve:
    heading: str
    chart: Chart


def _curves(history: Sequence[Mapping[str, object]]) -> list[_Curve]:
    """The curves of training, those that have a point."""
    evaluation = "evaluation", "eval"
    drawn = []
    sets = [name for name in dict.fromkeys(set_and_figure(key)[0] for row in history for key in row) if name]
    for heading, log, lines in (
        ("Loss", True, (("training", "train", "loss"), (*evaluation, "eval_loss"))),
        ("Token accuracy", False, ((*evaluation, "eval_token_accuracy"),)),
        *((f"Loss of {name}", True, ((*evaluation, f"eval_{name}_loss"),)) for name in sets),
        ("Learning rate", False, (("learning rate", "rate", "learning_rate"),)),
        ("Gradient norm", True, (("gradient norm", "train", "grad_norm"),)),
    ):
        series = [Series(name, style, points(history, figure)) for name, style, figure in lines]
        if chart := line_chart(series, x_label="step", y_label=heading, log=log):
            drawn.append(_Curve(heading, chart))
    return drawn
