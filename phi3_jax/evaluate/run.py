"""An evaluation, from checkpoints and data to figures: base, adapters and merged checkpoints on the same rows."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from phi3_jax.config.generation import GenerationConfig
from phi3_jax.config.hub_options import Hub
from phi3_jax.config.model import Phi3Config
from phi3_jax.config.names import BASE
from phi3_jax.config.run import RunConfig
from phi3_jax.config.sections import DataSection, ModelSection, ParallelSection
from phi3_jax.data import prepare_data
from phi3_jax.data.vocabulary import check_row_ids, check_vocabulary
from phi3_jax.evaluate.metric import Metric
from phi3_jax.evaluate.metrics import make_metrics, split_metrics
from phi3_jax.evaluate.names import Named, check_names, name_models
from phi3_jax.evaluate.predict import Runner, Task
from phi3_jax.evaluate.predictions import (
    Prediction,
    PredictionFile,
    check_folder,
    rows_fingerprint,
    settings_text,
    weights_fingerprint,
)
from phi3_jax.evaluate.results import Results, report_rows
from phi3_jax.evaluate.turns import every_turn
from phi3_jax.generation.text import check_prompt, end_token_ids, padding_id
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.parallel.devices import Devices
from phi3_jax.parallel.distributed import check_agreement, is_main, together
from phi3_jax.parallel.layout import weight_sharding
from phi3_jax.parallel.mesh import auto_dtype
from phi3_jax.peft.adapter import PeftAdapter
from phi3_jax.peft.base import open_base
from phi3_jax.report.write import write_evaluation_report
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, write_text
from phi3_jax.system.lock import RunLock
from phi3_jax.system.reading import local_path
from phi3_jax.system.telling import taking_first, verbosity
from phi3_jax.training.checks import check_length, check_shared
from phi3_jax.training.job import job_devices
from phi3_jax.training.results import command_line
from phi3_jax.training.versions import versions


@dataclass(frozen=True)
class _Model:
    """One of the models: the base or a merged one, which is a checkpoint, or an adapter."""

    name: str
    source: Checkpoint | PeftAdapter
    is_base: bool = False

    @property
    def kind(self) -> str:
        if isinstance(self.source, PeftAdapter):
            return "adapter"
        return "base" if self.is_base else "merged"


def evaluate(
    model: str | Path | None,
    data: str | Path | DataSection,
    *,
    adapters: Named = (),
    merged: Named = (),
    metrics: str | Sequence[str] = "loss",
    output_dir: str | Path | None = None,
    include_base: bool = True,
    dtype: str = "auto",
    quantization: Literal["nf4", "int8"] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    parallel: ParallelSection | None = None,
    batch_size: int = 4,
    turns: Literal["last", "all"] | None = None,
    **generation: object,
) -> Results:
    """Measures a base, its adapters and merged checkpoints on the same rows, in the same way.

    Args:
        model: The base, a checkpoint folder or hub id; its tokenizer makes the rows of all models. None for the one
            that the adapters name, at the revision that they were trained on.
        data: File, folder or hub id, or a section that says more; its `packing` and `shuffle` are not heeded.
        adapters: Folders or hub ids, by name, or named by their last part.
        merged: The same of merged checkpoints.
        metrics: Names, as a sequence or with commas between them; see docs/evaluation.md.
        output_dir: Where predictions are kept as they come, and results.json and report.html are written at the end.
            An evaluation that was interrupted there goes on where it stopped.
        include_base: False leaves the base's own figures out, and with them all differences.
        dtype: Of the base; `auto` is bfloat16, and float32 on a CPU.
        quantization: Of the base: `nf4` or `int8`.
        revision: Of the base, on the hub; default: the one that the adapters were trained on.
        cache_dir: Where hub downloads are kept.
        local_files_only: Whether nothing may be downloaded.
        parallel: The mesh, as in training.
        batch_size: Rows of a device in a forward pass.
        turns: Which of a row's assistant turns are answered and compared: the last, or all, each with what stands
            before it in the row, and as a row of its own. Default: all where `tool_call` is measured, since calls stand
            before a row's end, and otherwise the last.
        **generation: Fields of `GenerationConfig` over the checkpoint's own; without `do_sample` the most likely tokens
            are taken, and `max_new_tokens` is 128.

    Returns:
        The figures of every model with their intervals, and every row's prediction.

    Raises:
        InputError: Something is wrong with the arguments, the data, the checkpoints or the folder; nothing was written.

    Example:
        >>> import tempfile
        >>> from phi3_jax.demo import demo_path
        >>> data = Path(tempfile.mkdtemp()) / "test.jsonl"
        >>> _ = data.write_text('{"prompt": "3 red mugs to Oslo?", "completion": "mugs; 3"}')
        >>> results = evaluate(demo_path("base"), data, max_new_tokens=4)
        >>> loss = results.models["base"]["loss"]
        >>> 0 < loss.low <= loss.value <= loss.high
        True
    """
    specs = split_metrics(metrics) if isinstance(metrics, str) else list(metrics)
    made = make_metrics(specs)
    names = name_models(adapters), name_models(merged)
    check_names([BASE, *names[0], *names[1]])
    hub = Hub(revision, cache_dir=cache_dir, local_files_only=local_files_only)
    opened = {name: PeftAdapter.open(given, hub.at(None)) for name, given in names[0].items()}
    base = open_base(model, opened.values(), hub)
    others = [_Model(name, adapter) for name, adapter in opened.items()]
    others += [_Model(name, Checkpoint.open(given, hub.at(None))) for name, given in names[1].items()]
    models = [_Model(BASE, base, is_base=True), *others] if include_base else others
    section = data if isinstance(data, DataSection) else DataSection(train=str(data))
    turns = turns or _usual_turns(made, section)
    _check_turns(turns, section)
    run = RunConfig(
        ModelSection(base.name, dtype=auto_dtype(dtype), quantization=quantization),  # type: ignore[arg-type]
        data=replace(section, packing=False, shuffle=False),
        parallel=parallel or ParallelSection(),
    )
    task = _task(run, made, base, job_devices(run, base.config), batch_size, turns, generation)
    for other in others:
        if isinstance(other.source, Checkpoint):
            _check_rows(task, other.source.config, other.name)
    settings = _settings(run, task, base, models, specs)
    check_agreement({"evaluation": settings_text(settings)})
    target = None if output_dir is None else local_path(output_dir, "output_dir")
    if target is not None:
        with together():
            check_folder(target, settings)
    with ExitStack() as held:
        with task.devices.in_use():
            found = _run_all(task, run, base, models, target, settings, held)
        results = Results.of(list(made.values()), found, task.rows.stats.to_dict())
        if target is not None:
            with together():
                if is_main():
                    _write(target, results, settings, base.name, str(section.train))
    return results


def _task(
    run: RunConfig,
    metrics: Mapping[str, Metric],
    base: Checkpoint,
    devices: Devices,
    rows_each: int,
    turns: str,
    generation: Mapping[str, object],
) -> Task:
    """The rows and how to judge them. Raises `InputError` for rows that the metrics cannot use."""
    tokenizer, config = base.tokenizer, base.config
    rows = prepare_data(run.data, tokenizer, seed=0).train
    if turns == "all":
        rows = every_turn(rows, tokenizer, run.data.max_length)
    settings = GenerationConfig.from_model(config, **{"max_new_tokens": 128, "do_sample": False, **generation})
    if "eos_token_id" not in generation:
        settings = settings.with_(eos_token_id=end_token_ids(tokenizer, config))
    pad_id = padding_id(tokenizer, config)
    settings = settings.with_(num_return_sequences=1)
    task = Task(tokenizer, rows, run.data, list(metrics.values()), settings, pad_id, devices, rows_each)
    _check_references(task, metrics)
    check_vocabulary([rows], tokenizer, config.vocab_size)
    _check_rows(task, config, BASE)
    for metric in task.metrics:
        metric.prepare(rows.references)
        if metric.notice is not None:
            rows.stats.notices.append(metric.notice)
    return task


def _usual_turns(metrics: Mapping[str, Metric], data: DataSection) -> Literal["last", "all"]:
    return "all" if "tool_call" in metrics and data.loss_on == "assistant" else "last"


def _check_turns(turns: str, data: DataSection) -> None:
    if turns not in ("last", "all"):
        raise InputError(f"turns is {turns!r}, expected last or all")
    if turns == "all" and data.loss_on != "assistant":
        raise InputError(f"turns is all, and data.loss_on {data.loss_on}; all turns are those of loss_on assistant")


def _check_references(task: Task, metrics: Mapping[str, Metric]) -> None:
    names = [name for name, metric in metrics.items() if metric.needs_answers]
    if not names:
        return
    rows = task.rows
    missing = [row for row, reference in enumerate(rows.references) if not reference]
    if missing:
        raise InputError(
            f"metric {names[0]} needs a reference, and {len(missing)} of {len(rows)} rows (the first is row "
            f"{missing[0] + 1}) have no assistant turn; give rows with one, or measure loss alone"
        )
    cut = next((row for row, length in enumerate(rows.prompt_lengths) if not length), None)
    if cut is not None:
        raise InputError(f"row {cut + 1}: its prompt is longer than data.max_length {task.data.max_length}; raise that")


def _check_rows(task: Task, config: Phi3Config, name: str) -> None:
    """Raises `InputError` where a model has too few positions, or not these tokens."""
    check_length(int(task.rows.lengths.max()), config)
    check_row_ids(task.rows, config.vocab_size, task.tokenizer, model=name)
    if task.needs_answers:
        for row in range(len(task.rows)):
            check_prompt(task.prompt(row), f"row {row + 1}: its prompt", config, task.settings, task.tokenizer)


def _settings(
    run: RunConfig, task: Task, base: Checkpoint, models: Sequence[_Model], specs: Sequence[str]
) -> dict[str, object]:
    """What config.yaml says: everything that a line of predictions depends on, with fingerprints of what
    lies in files."""
    files = [spec.partition("=")[2] for spec in specs if spec.startswith("json_schema=")]
    return {
        "base": {
            "name_or_path": base.name,
            "weights": weights_fingerprint(base.folder),
            "dtype": run.model.dtype,
            "quantization": run.model.quantization,
        },
        "models": {
            model.name: {
                "kind": model.kind,
                "name_or_path": model.source.name,
                "weights": weights_fingerprint(model.source.folder),
            }
            for model in models
        },
        "data": {
            "train": run.data.train,
            "loss_on": run.data.loss_on,
            "max_length": run.data.max_length,
            "rows": rows_fingerprint(task.rows),
        },
        "metrics": list(specs),
        "schemas": [hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files],
        "generation": asdict(task.settings) if task.needs_answers else None,
        "parallel": asdict(run.parallel),
        "batch_size": task.rows_each,
    }


def _run_all(
    task: Task,
    run: RunConfig,
    base: Checkpoint,
    models: Sequence[_Model],
    target: Path | None,
    settings: Mapping[str, object],
    held: ExitStack,
) -> dict[str, list[Prediction]]:
    """Every model's predictions; those on the base first, which is loaded once."""
    files = {model.name: _file(target, model.name, len(task.rows)) for model in models}
    is_done = {name: file is not None and len(file.found) == len(task.rows) for name, file in files.items()}
    found: dict[str, list[Prediction]] = {}
    on_base = [model for model in models if model.is_base or isinstance(model.source, PeftAdapter)]
    merged = [(model, model.source) for model in models if isinstance(model.source, Checkpoint) and not model.is_base]
    console = Console(stderr=True, quiet=not is_main() or verbosity() == "quiet")
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:

        def keep(model: _Model, predictions: Iterable[Prediction]) -> None:
            file = files[model.name]
            known = {} if file is None else dict(file.found)
            bar = progress.add_task(model.name, total=len(task.rows), completed=len(known))
            for prediction in _kept(file, predictions):
                known[prediction.id] = prediction
                progress.update(bar, advance=1)
            found[model.name] = [known[row] for row in range(len(task.rows))]

        def missing(model: _Model) -> list[int]:
            file = files[model.name]
            return [row for row in range(len(task.rows)) if file is None or row not in file.found]

        is_needed = not all(is_done[model.name] for model in on_base)
        # Adapters first: what is wrong with one should show before weights are read and hours spent.
        loras = {
            model.name: model.source.load(base.shapes, base)
            for model in on_base
            if is_needed and isinstance(model.source, PeftAdapter)
        }
        loaded = _load(run, task, base) if is_needed else None
        _begin(target, settings, files, held)
        for model in on_base:
            rows = missing(model)
            predictions: Iterator[Prediction] = iter(())
            if rows and loaded is not None:
                predictions = loaded.predictions(task, model.name, loras.get(model.name), rows)
                predictions = taking_first(f"compiling and measuring the first rows of {model.name}", predictions)
            keep(model, predictions)
        del loaded
        for model, checkpoint in merged:
            rows = missing(model)
            runner = _load(run, task, checkpoint) if rows else None
            keep(model, iter(()) if runner is None else runner.predictions(task, model.name, None, rows))
            del runner
    return {model.name: found[model.name] for model in models}


def _load(run: RunConfig, task: Task, checkpoint: Checkpoint) -> Runner:
    mesh = task.devices.mesh
    loaded = checkpoint.load_model(
        dtype=run.model.dtype,
        quantization=run.model.quantization,
        shardings=partial(weight_sharding, mesh=mesh),
        split=mesh.shape["tensor"] > 1,
    )
    return Runner(loaded, task.devices)


def _file(target: Path | None, name: str, rows: int) -> PredictionFile | None:
    return None if target is None else PredictionFile(target / "predictions" / f"{name}.jsonl", rows)


def _begin(
    target: Path | None, settings: Mapping[str, object], files: Mapping[str, PredictionFile | None], held: ExitStack
) -> None:
    """Takes the folder until `held` ends, once all that can be wrong with the input has been looked at."""
    if target is None:
        return
    ids = {name: sorted(file.found) for name, file in files.items() if file is not None}
    check_agreement({"predictions found": str(ids)})
    with together():
        if is_main():
            with storing(target):
                target.mkdir(parents=True, exist_ok=True)
            held.callback(RunLock.take(target, "output_dir").release)
            write_text(target / "config.yaml", settings_text(settings))
    with together():
        check_shared(target / "config.yaml", settings_text(settings))


def _kept(file: PredictionFile | None, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """The predictions, each in the file by the time it comes."""
    if file is None or not is_main():
        yield from predictions
        return
    file.open()
    try:
        for prediction in predictions:
            file.append(prediction)
            yield prediction
    finally:
        file.close()


def _write(target: Path, results: Results, settings: Mapping[str, object], base: str, data: str) -> None:
    """results.json and report.html, each whole or not at all."""
    # In a notebook there is no command; the folder's own settings say what was done.
    command = command_line(["phi3-jax", "evaluate", "--model", base])
    found = {**results.to_dict(), "settings": settings, "command": command, "versions": versions()}
    write_text(target / "results.json", json.dumps(found, indent=4) + "\n")
    rows = list(zip(*results.predictions.values(), strict=True))
    samples = [
        {"prompt": row[0].prompt, "reference": row[0].reference, "answers": [part.answer for part in row]}
        for row in rows
        if row[0].answer is not None
    ]
    write_evaluation_report(
        target / "report.html",
        title=f"{', '.join(results.predictions)} on {Path(data).name}",
        columns=list(results.predictions),
        metrics=report_rows(results),
        samples=samples,
        command=command,
        versions=versions(),
        data_stats={"rows": results.data},
    )
