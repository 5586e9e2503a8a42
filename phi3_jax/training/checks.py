"""What can be wrong with a run's settings and its output folder, found before anything is loaded or written."""

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from phi3_jax.config import Phi3Config
from phi3_jax.errors import InputError
from phi3_jax.parallel.mesh import AXES
from phi3_jax.run_config import RunConfig

# What a run leaves behind that another run would spoil.
RUN_FILES = ("metrics.jsonl", "checkpoints", "adapter", "model")

RESULT_FILES = ("config.yaml", "train_results.json", "eval_results.json", "all_results.json", "report.html")

# Settings that a resumed run may change: none of them touches the weights. How many rows a step has, over
# all devices, is checked with the rows themselves.
FREE_ON_RESUME = frozenset(
    {
        "model.cache_dir",
        "model.local_files_only",
        "model.attention",
        "training.output_dir",
        "training.overwrite_output_dir",
        "training.per_device_train_batch_size",
        "training.per_device_eval_batch_size",
        "training.gradient_checkpointing",
        "training.remat_policy",
        "training.logging_steps",
        "training.save_strategy",
        "training.save_steps",
        "training.save_total_limit",
        "training.resume_from_checkpoint",
        *(f"parallel.{axis}" for axis in AXES),
    }
)


def check_settings(run: RunConfig) -> None:
    """Raises `InputError` for what the sections cannot see by themselves."""
    if run.data.train is None:
        raise InputError("data.train is not set; name a file, a folder or a hub dataset to train on")
    if run.logging.wandb and find_spec("wandb") is None:
        raise InputError("logging.wandb is true but wandb is not installed; pip install wandb, or set it to false")


def check_output_folder(run: RunConfig) -> None:
    """Raises `InputError` where the output folder cannot be one, or holds a run that is not to be resumed."""
    folder = Path(run.training.output_dir)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise InputError(f"training.output_dir {folder}: {part} is a file, expected a folder; name another one")
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"training.output_dir {folder}: {nearest} cannot be written to; name another folder")
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and not (run.training.resume_from_checkpoint or run.training.overwrite_output_dir):
        raise InputError(
            f"{folder} already holds a run ({', '.join(found)}); name another training.output_dir, or set "
            "training.resume_from_checkpoint true to continue it"
        )
    if run.training.resume_from_checkpoint and any(p.name.isdecimal() for p in (folder / "checkpoints").glob("*")):
        check_unchanged(run, folder / "config.yaml")


def check_mesh(run: RunConfig, config: Phi3Config, mesh: Mapping[str, int]) -> None:
    """Raises `InputError` where the mesh does not divide what it is to cut.

    **Arguments**: `mesh`, the size of each axis.
    """
    tensor, context = mesh["tensor"], mesh["context"]
    heads = {"attention heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads}
    for what, number in {**heads, "hidden units of the MLP": config.intermediate_size}.items():
        if number % tensor:
            raise InputError(
                f"parallel.tensor is {tensor}, which does not divide the model's {number} {what}; give a divisor"
            )
    if run.data.max_length % context:
        raise InputError(
            f"parallel.context is {context}, which does not divide data.max_length {run.data.max_length}; give a "
            "divisor"
        )
    if context & (context - 1) and not run.data.packing:
        raise InputError(
            f"parallel.context is {context}, but without data.packing rows have powers of two of positions; give a "
            "power of two, or set data.packing true"
        )
    if tensor > 1 and run.model.quantization is not None:
        raise InputError(
            f"parallel.tensor is {tensor}, but the blocks of model.quantization {run.model.quantization} cannot be "
            "parted so; use parallel.fsdp"
        )


def check_length(longest: int, config: Phi3Config) -> None:
    """Raises `InputError` where a conversation is longer than the model has positions."""
    positions = config.max_position_embeddings
    if longest > positions:
        raise InputError(
            f"rows are up to {longest:,} tokens long, but the model has {positions:,} positions; set data.max_length "
            f"{positions}"
        )


def check_shared(file: Path, text: str) -> None:
    """Raises `InputError` where this host does not find what the first one has written."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"training.output_dir {file.parent} is not the same folder on all hosts; name one on storage that they "
            "share, such as a mounted bucket"
        )


def remove_run(folder: Path) -> None:
    """Removes the run that the folder holds, and nothing else that lies in it."""
    for name in (*RUN_FILES, *RESULT_FILES, "tensorboard"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_unchanged(run: RunConfig, config_file: Path) -> None:
    """Raises `InputError` naming the settings that differ from those the run was started with, but
    for those that cannot change its result."""
    try:
        before = _flat(yaml.safe_load(config_file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise InputError(
            f"{config_file}: cannot be read, so that the run cannot be resumed with the settings it was started "
            "with; restore it, or start in another folder"
        ) from error
    now = _flat(run.to_dict())
    changed = [
        f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME and not name.startswith("logging.")
    ]
    if changed:
        raise InputError(
            f"{config_file.parent}: cannot be resumed with other settings: {'; '.join(changed)}; "
            "set them back, or start in another folder"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value."""
    return {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
