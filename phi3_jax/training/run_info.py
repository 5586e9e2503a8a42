"""What a run's folder tells of the run: what was trained on what, how far it came, how it ended, and how to go on."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.config.parse import read_yaml
from phi3_jax.config.run import RunConfig, parse_run_config
from phi3_jax.peft.config import CONFIG_FILE
from phi3_jax.peft.folder import ADAPTER, CHECKPOINTS, MODEL, RUN_CONFIG
from phi3_jax.system import manifest
from phi3_jax.system.errors import InputError
from phi3_jax.system.lock import check_not_held
from phi3_jax.system.reading import read_json, read_text
from phi3_jax.system.text import one_line, printable

METRICS, RESULTS, VERSIONS = "metrics.jsonl", "all_results.json", "versions.json"
Row = Mapping[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a run has written this folder."""
    return (folder / RUN_CONFIG).is_file() and any(
        (folder / name).exists() for name in (METRICS, CHECKPOINTS, VERSIONS)
    )


def run_info(folder: Path) -> dict[str, Any]:
    """What can be said of a run from the files in its folder; fit for JSON.

    Returns:
        `base`, `revision`, `dtype`, `quantization`; `trains`, in words; `weights`, the folder of the adapter or model,
        None where there is none yet; `train` and `eval`, where the rows were from; `steps` and `epochs` done, and `of`
        how many of each; `first` and `last`, the rows of metrics.jsonl with a loss, and `evaluations`, those with an
        evaluation's; `metric`, by which they are compared; `best`, the step and value of the best one, with `metric`;
        `results`, the figures at the end; `checkpoints`, each with `step`, its `figure` of that metric and `problem`;
        `device` and `versions` it ran on last; `state`, one
        of finished, running, stopped and not finite, with `ended` in words; and `next`, commands to go on with.

    Raises:
        InputError: The configuration cannot be read.
    """
    run, _ = parse_run_config(read_yaml(folder / RUN_CONFIG))
    rows = _rows(folder / METRICS)
    losses = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if any(key.startswith("eval_") for key in row)]
    results = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    checkpoints = _checkpoints(folder / CHECKPOINTS, run)
    steps = max([int(row.get("step", 0)) for row in rows] + [entry["step"] for entry in checkpoints], default=0)
    weights = next((folder / name for name in (ADAPTER, MODEL) if (folder / name).is_dir()), None)
    state, ended = _state(folder, run, steps, results, weights, checkpoints)
    newest = _versions(folder / VERSIONS)
    return {
        "base": run.model.name_or_path,
        "revision": run.model.revision,
        "dtype": run.model.dtype,
        "quantization": run.model.quantization,
        "trains": _trains(run),
        "weights": None if weights is None else str(weights),
        "train": run.data.train,
        "eval": _evaluated_on(run),
        "steps": steps,
        "epochs": max((float(row.get("epoch", 0)) for row in rows), default=0.0),
        "of": {"steps": run.training.max_steps if run.training.max_steps > 0 else None, **_epochs(run)},
        "first": losses[0] if losses else None,
        "last": losses[-1] if losses else None,
        "evaluations": evaluations,
        "metric": run.training.best_metric,
        "best": _best(run, evaluations),
        "results": results,
        "checkpoints": checkpoints,
        "device": newest.get("device"),
        "versions": newest,
        "state": state,
        "ended": ended,
        "next": _next(folder, run, state, weights, checkpoints),
    }


def _rows(path: Path) -> list[Row]:
    """The lines of metrics.jsonl; one that a killed process left half-written is not counted."""
    rows: list[Row] = []
    for line in read_text(path).splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _versions(path: Path) -> dict[str, str]:
    """Those that the run ran on last."""
    try:
        found = json.loads(read_text(path)) if path.is_file() else []
    except ValueError:
        found = []
    return found[-1] if isinstance(found, list) and found and isinstance(found[-1], dict) else {}


def _checkpoints(folder: Path, run: RunConfig) -> list[dict[str, Any]]:
    sign = -1 if run.training.more_is_better else 1  # of a score less is better
    found = []
    for path in sorted((path for path in folder.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name)):
        score, problem = None, None
        try:
            score = manifest.check(path, thoroughly=False)
        except (manifest.Damaged, OSError) as error:
            problem = str(error)
        figure = None if score is None else sign * score
        found.append({"step": int(path.name), "path": str(path), "figure": figure, "problem": problem})
    return found


def _trains(run: RunConfig) -> str:
    peft = run.peft
    if peft.full_finetuning:
        return "every weight"
    targets = peft.target_modules if isinstance(peft.target_modules, str) else ", ".join(peft.target_modules or ())
    kind = "DoRA" if peft.use_dora else "LoRA"
    start = f", from {peft.init_from}" if peft.init_from else ""
    return f"an adapter: {kind} r {peft.r}, lora_alpha {peft.lora_alpha}, on {targets}{start}"


def _evaluated_on(run: RunConfig) -> str | None:
    data = run.data
    if data.eval is not None:
        return data.eval if isinstance(data.eval, str) else ", ".join(map(str, data.eval))
    if data.eval_split is not None:
        return f"split {data.eval_split} of {data.train}"
    return f"{data.eval_fraction:g} of the training rows" if data.eval_fraction else None


def _epochs(run: RunConfig) -> dict[str, float | None]:
    return {"epochs": None if run.training.max_steps > 0 else run.training.num_train_epochs}


def _best(run: RunConfig, evaluations: Sequence[Row]) -> dict[str, Any] | None:
    """The best evaluation after the first step, by the run's own metric."""
    metric = run.training.best_metric
    found = [row for row in evaluations if row.get("step") and isinstance(row.get(metric), int | float)]
    if not found:
        return None
    row = (max if run.training.more_is_better else min)(found, key=lambda row: float(row[metric]))
    return {"metric": metric, "step": row["step"], "value": row[metric]}


def _state(
    folder: Path, run: RunConfig, steps: int, results: Row, weights: Path | None, checkpoints: Sequence[Row]
) -> tuple[str, str]:
    """In a word, and in words."""
    try:
        check_not_held(folder)
    except InputError as error:
        return "running", f"it is going on: {str(error).partition('(')[2].partition(')')[0]}"
    if results and weights is not None:
        training = run.training
        if training.max_steps > 0:
            is_short = int(results.get("global_step", steps)) < training.max_steps
        else:
            is_short = float(results.get("epoch", training.num_train_epochs)) < training.num_train_epochs - 0.01
        early = training.early_stopping_patience is not None and is_short
        why = ", before its time: no better evaluation for training.early_stopping_patience" if early else ""
        return "finished", f"it came to its end at step {results.get('global_step', steps)}{why}"
    if weights is not None:
        return "not finite", f"it ended because its numbers were not finite; {weights} holds the last good weights"
    if checkpoints:
        return "stopped", f"it was stopped, or killed; the checkpoint of step {checkpoints[-1]['step']} is the newest"
    return "stopped", "it ended before its first checkpoint, so that there is nothing to go on from"


def _next(folder: Path, run: RunConfig, state: str, weights: Path | None, checkpoints: Sequence[Row]) -> list[str]:
    here = shlex.quote(str(folder))
    if state == "running":
        return []
    if state == "stopped" and checkpoints:
        if run.data.in_memory:
            return ["p3.train(run, train_dataset=...) with the same rows and training.resume_from_checkpoint true"]
        config = shlex.quote(str(folder / RUN_CONFIG))
        resume = f"phi3-jax train --config {config} --training.resume_from_checkpoint true"
        usable = [entry["path"] for entry in checkpoints if (Path(entry["path"]) / CONFIG_FILE).is_file()]
        return [resume, *(f"phi3-jax chat --adapter {shlex.quote(path)}" for path in usable[-1:])]
    if weights is None:
        return []
    if run.peft.full_finetuning:
        model = shlex.quote(str(weights))
        return [f"phi3-jax chat --model {model}", f"phi3-jax evaluate --model {model} --data FILE"]
    return [
        f"phi3-jax chat --adapter {here}",
        f"phi3-jax evaluate --adapter {here} --data FILE",
        f"phi3-jax export {here} --merge --output {shlex.quote(str(folder / 'merged'))}",
    ]


def print_run(path: str, info: Mapping[str, Any]) -> None:
    """Prints what `run_info` found, for people; nothing in it steers their terminal."""
    print(f"{printable(path)}: a run; {one_line(info['ended'])}")
    revision = f" at {info['revision']}" if info["revision"] else ""
    kept = f", kept in {info['quantization']}" if info["quantization"] else ""
    of = info["of"]
    whole = f" of {of['steps']:,}" if of["steps"] else f" ({info['epochs']:.3g} of {of['epochs']:g} epochs)"
    rows = {
        "base": f"{info['base']}{revision}, {info['dtype']}{kept}",
        "trains": info["trains"],
        "weights": info["weights"] or "none yet",
        "rows": f"{info['train']}; evaluated on {info['eval'] or 'none'}",
        "steps": f"{info['steps']:,}{whole}",
        "loss": _course(info["first"], info["last"], "loss"),
    }
    for key in dict.fromkeys(key for row in info["evaluations"] for key in row if key.endswith("_loss")):
        found = [row for row in info["evaluations"] if key in row]
        rows[key] = _course(found[0], found[-1], key)
    if info["best"]:
        best = info["best"]
        rows["best"] = f"{best['metric']} {best['value']:.4g} at step {best['step']}"
    shown = {key: value for key, value in info["results"].items() if _is_figure(key, value)}
    if shown:
        rows["results"] = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    rows["checkpoints"] = ", ".join(_checkpoint(entry, info["metric"]) for entry in info["checkpoints"]) or "none"
    if info["device"]:
        rows["ran on"] = f"{info['device']}, JAX {info['versions'].get('jax', '?')}"
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"  {name:<{width}}  {one_line(text)}")
    if info["next"]:
        print("next:")
        for command in info["next"]:
            print(f"  {one_line(command)}")


def _is_figure(key: str, value: object) -> bool:
    return isinstance(value, int | float) and not key.startswith(("train_", "epoch", "global_step"))


def _course(first: Row | None, last: Row | None, key: str) -> str:
    if first is None or last is None:
        return "none yet"
    start = f"{first[key]:.4g} at step {first['step']}"
    return start if first is last else f"{start}, {last[key]:.4g} at step {last['step']}"


def _checkpoint(entry: Row, metric: str) -> str:
    said = f"{metric} {entry['figure']:.4g}" if entry["figure"] is not None else ""
    said = f"damaged: {entry['problem']}" if entry["problem"] else said
    return f"{entry['step']}{f' ({said})' if said else ''}"
