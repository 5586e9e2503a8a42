"""What a run leaves behind: the adapter or model, the result files, and the report."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from phi3_jax.hf.checkpoint import save_model
from phi3_jax.hf.peft import save_adapter
from phi3_jax.lora import Lora
from phi3_jax.parallel.distributed import is_main, to_host, together
from phi3_jax.run_config import RunConfig
from phi3_jax.training.job import Job
from phi3_jax.training.step import Params


def save_weights(folder: Path, run: RunConfig, job: Job, trainable: Params) -> Path:
    """Writes `adapter/`, or after full fine-tuning `model/`, each with the tokenizer."""
    model, lora = job.model_and_lora(trainable)
    if lora is None:
        target = folder / "model"
        save_model(model, target)
        if is_main():
            job.tokenizer.save_pretrained(target)
        return target
    target = folder / "adapter"
    lora = to_host(lora)
    with together():
        if is_main():
            _save_adapter(target, run, job, lora)
    return target


def _save_adapter(target: Path, run: RunConfig, job: Job, lora: Lora) -> None:
    # PEFT looks for a base under this name from wherever it runs.
    base = run.peft.base_model_name_or_path or run.model.name_or_path
    if Path(base).is_dir():
        base = str(Path(base).absolute())
    save_adapter(target, lora, tokenizer=job.tokenizer, base_model_name_or_path=base)


def write_results(folder: Path, train: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Writes the three files of transformers' example scripts."""
    write_json(folder / "train_results.json", train)
    if evaluation:
        write_json(folder / "eval_results.json", evaluation)
    write_json(folder / "all_results.json", {**train, **evaluation})


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=4, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def versions() -> dict[str, str]:
    """What the run ran on, for the report."""
    found = {name: version(name) for name in ("phi3_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")}
    return {**found, "python": platform.python_version(), "device": jax.devices()[0].device_kind}


def command_line() -> str:
    return shlex.join(sys.argv)
