"""What a run leaves behind: the adapter or model, the result files, and the report."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from phi3_jax.config.run import RunConfig
from phi3_jax.hf.save import save_model
from phi3_jax.parallel.distributed import is_main, to_host, together
from phi3_jax.peft.card import trained_card
from phi3_jax.report.write import write_report
from phi3_jax.system.files import write_text
from phi3_jax.system.memory import resident_peak
from phi3_jax.system.secrets import redact_command
from phi3_jax.training.adapter_files import RunAdapter
from phi3_jax.training.evaluation import EvalFigures
from phi3_jax.training.job import RunJob
from phi3_jax.training.metrics import Row
from phi3_jax.training.step import Params
from phi3_jax.training.versions import versions


def save_weights(folder: Path, run: RunConfig, job: RunJob, trainable: Params) -> Path:
    """Writes `adapter/`, or after full fine-tuning `model/`, each with the tokenizer."""
    model, lora = job.model_and_lora(trainable)
    if lora is None:
        target = folder / "model"
        save_model(model, target, tokenizer=job.tokenizer)
        if is_main():
            write_text(target / "README.md", trained_card(run.model.name_or_path))
        return target
    target = folder / "adapter"
    lora = to_host(lora)
    with together():
        if is_main():
            RunAdapter(run, job).save(target, lora)
    return target


def write_results(folder: Path, train: Row, evaluation: EvalFigures) -> None:
    """Writes the three files of transformers' example scripts."""
    write_json(folder / "train_results.json", train)
    if evaluation:
        write_json(folder / "eval_results.json", evaluation)
    write_json(folder / "all_results.json", {**train, **evaluation})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes a result file, as transformers does."""
    write_text(path, json.dumps(value, indent=4, sort_keys=True) + "\n")


def samples(job: RunJob, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    """The prompts that were answered, for the report: what the data says, and the answers; none before, perhaps."""
    told = [
        {"prompt": job.tokenizer.decode(ids), "reference": reference, "after": new}
        for (ids, reference), new in zip(job.prompts, after, strict=True)
    ]
    return [{**row, "before": old} for row, old in zip(told, before, strict=True)] if before else told


def report(
    run: RunConfig,
    job: RunJob,
    history: Sequence[Row],
    before: EvalFigures,
    after: EvalFigures,
    samples: list[dict[str, str]],
    figures: Row,
) -> None:
    """Writes report.html.

    Args:
        run: the run.
        job: what it worked on.
        history: the rows of metrics.jsonl.
        before: the evaluation's figures before training, empty where there was none.
        after: those at the end.
        samples: prompts with their answers.
        figures: those of training.
    """
    folder = Path(run.training.output_dir)
    again = [] if run.data.in_memory else ["phi3-jax", "train", "--config", str(folder / "config.yaml")]
    write_report(
        folder / "report.html",
        run_config=run.to_dict(),
        history=history,
        before=before or None,
        after=after or None,
        samples=samples,
        data_stats=job.data.stats,
        parameter_table=[(row.module, row.count) for row in job.table.rows],
        versions=versions(),
        # Rows in memory are in no file that a command could read.
        command=command_line(again),
        train_results=figures,
        memory=peak_memory(),
    )


def peak_memory() -> dict[str, int | None]:
    """The most memory so far: `host_peak_bytes`, resident of this process; `device_peak_bytes`, in use on
    the device of this host that used most, None where the backend does not count (a CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    return {
        "host_peak_bytes": resident_peak(),
        "device_peak_bytes": max(peaks, default=None),
    }


def command_line(otherwise: Sequence[str] = ()) -> str:
    """What does the same again: this process's command, or `otherwise` where it is none, as in a notebook.

    Tokens are left out, see `phi3_jax.system.secrets`.
    """
    if not hasattr(sys.modules["__main__"], "__file__"):
        return redact_command(otherwise)
    program, *arguments = sys.argv
    if Path(program).name == "phi3-jax":
        return redact_command(["phi3-jax", *arguments])
    return redact_command(["python", program, *arguments])
