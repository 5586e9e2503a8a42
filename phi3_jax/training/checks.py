"""What can be wrong with a run's settings and its output folder, found before anything is loaded or written."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from phi3_jax.config.model import Phi3Config
from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.distributed import is_main
from phi3_jax.parallel.mesh import AXES
from phi3_jax.parallel.sharding import check_tensor_axis
from phi3_jax.peft.continued import BEGINNINGS, STRUCTURE
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import check_writable, storing
from phi3_jax.system.lock import check_not_held
from phi3_jax.system.memory import total_memory
from phi3_jax.system.reading import read_yaml
from phi3_jax.training.resume import ResumePoint

# What a run leaves behind that another run would spoil.
RUN_FILES = ("metrics.jsonl", "checkpoints", "adapter", "model")

RESULT_FILES = (
    "config.yaml",
    "versions.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "report.html",
)

# What a file is called, or a folder, until it is whole: a killed process leaves them behind.
REMOVING = ".removing"
LEFTOVERS = (
    *(f"{name}.tmp" for name in ("metrics.jsonl", *RESULT_FILES)),
    *(f"{name}{REMOVING}" for name in (*RUN_FILES, "tensorboard", "profile")),
    ".adapter.*",
    ".pushing-*",
    "model/.saving-*",
)

# Settings that a resumed run may change: none of them touches the weights. How many rows a step has, over
# all devices, is checked with the rows themselves.
FREE_ON_RESUME = frozenset(
    {
        "model.cache_dir",
        "model.local_files_only",
        "model.attention",
        "data.cache",
        "training.output_dir",
        "training.per_device_train_batch_size",
        "training.per_device_eval_batch_size",
        "training.gradient_checkpointing",
        "training.remat_policy",
        "training.compiler_options",
        "training.chunk_mlp",
        "training.logging_strategy",
        "training.logging_steps",
        "training.logging_first_step",
        "training.eval_on_start",
        "training.max_skipped_steps",
        "training.push_to_hub",
        "training.hub_model_id",
        "training.hub_strategy",
        "training.hub_private_repo",
        "training.hub_revision",
        "training.hub_always_push",
        "training.debug_nans",
        "training.save_strategy",
        "training.save_steps",
        "training.save_total_limit",
        "training.fallback_dir",
        "parallel.axes",
        *(f"parallel.{axis}" for axis in AXES),
    }
)

# What says how to resume, and is no setting of the run that is resumed.
RESUMING = frozenset({"training.resume_from_checkpoint", "training.resume_changed", "training.overwrite_output_dir"})

# Of a token in a batch: id, position, segment and whether it is a target, 32 bits each.
BATCH_BYTES = 16


def check_settings(run: RunConfig) -> None:
    """Looks for what the sections cannot see by themselves.

    Raises:
        InputError: where something is missing.
    """
    run.check_evaluation_rows()
    if run.logging.wandb and find_spec("wandb") is None:
        raise InputError("logging.wandb is true but wandb is not installed; pip install wandb, or set it to false")


def check_output_folder(run: RunConfig, *, held: bool = False) -> None:
    """Looks at the output folder and the fallback folder.

    Args:
        run: whose folders they are.
        held: that it is this process which holds the output folder. Of several, only the first one asks.

    Raises:
        InputError: where one of them cannot be a folder to write to, where the output folder holds a run that is not to
            be resumed, and where a run that goes on holds it.
    """
    folder, training = Path(run.training.output_dir), run.training
    check_writable("training.output_dir", folder)
    if run.training.fallback_dir is not None:
        check_writable("training.fallback_dir", Path(run.training.fallback_dir))
    if not held and is_main():
        check_not_held(folder)
    found = [name for name in RUN_FILES if (folder / name).exists()]
    point = ResumePoint.of(training)
    if found and not (point is not None and point.is_own) and not training.overwrite_output_dir:
        elsewhere = "" if point is None else f", not the one that {point.run} is to be gone on with from"
        raise InputError(
            f"{folder} already holds a run ({', '.join(found)}){elsewhere}; name another training.output_dir, or set "
            "training.resume_from_checkpoint true to continue it"
        )
    if point is not None and point.exists:
        check_unchanged(run, point.config)


def check_mesh(run: RunConfig, config: Phi3Config, mesh: Mapping[str, int]) -> None:
    """Looks whether the mesh divides what it is to cut.

    Args:
        run: its settings.
        config: the model's.
        mesh: the size of each axis.

    Raises:
        InputError: where it does not.
    """
    tensor, context = mesh["tensor"], mesh["context"]
    heads = {"attention heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads}
    check_tensor_axis(tensor, {**heads, "hidden units of the MLP": config.intermediate_size})
    if run.data.max_length is not None and run.data.max_length % context:
        raise InputError(
            f"parallel.context is {context}, which does not divide data.max_length {run.data.max_length}; give a "
            "divisor"
        )
    pieces, length = run.training.chunk_mlp, run.data.max_length
    if isinstance(pieces, int) and length is not None and length % (context * pieces):
        raise InputError(
            f"training.chunk_mlp is {pieces}, which does not divide the {length // context} positions that a device "
            f"has of a row, data.max_length {length}; give a divisor, or auto"
        )
    if context & (context - 1) and not run.data.packing:
        raise InputError(
            f"parallel.context is {context}, but without data.packing rows have powers of two of positions; give a "
            "power of two, or set data.packing true"
        )
    if tensor > 1 and run.model.quantization is not None:
        raise InputError(
            f"parallel.tensor is {tensor}, but the blocks of model.quantization {run.model.quantization} cannot be "
            "split so; use parallel.fsdp"
        )


def check_batch(run: RunConfig) -> None:
    """Looks at what a step's batch takes in the host's memory, before a program is compiled for it.

    Raises:
        InputError: where that is more than the machine has.
    """
    training = run.training
    tokens = training.per_device_train_batch_size * training.gradient_accumulation_steps * (run.data.max_length or 1)
    needed, there = tokens * BATCH_BYTES, total_memory()
    if needed > there:
        raise InputError(
            f"a step's batch has {tokens:,} tokens for each device, which take {needed / 2**30:,.1f} GiB, and this "
            f"machine has {there / 2**30:,.1f} GiB; lower training.per_device_train_batch_size, "
            "training.gradient_accumulation_steps or data.max_length"
        )


def check_length(longest: int, config: Phi3Config) -> None:
    """Looks at the longest conversation.

    Raises:
        InputError: where it is longer than the model has positions.
    """
    positions = config.max_position_embeddings
    if longest > positions:
        raise InputError(
            f"rows are up to {longest:,} tokens long, but the model has {positions:,} positions; set data.max_length "
            f"{positions}"
        )


def check_shared(file: Path, text: str) -> None:
    """Looks for what the first host has written.

    Raises:
        InputError: where this host does not find it.
    """
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"training.output_dir {file.parent} is not the same folder on all hosts; name one on storage that they "
            "share, such as a mounted bucket"
        )


def remove_run(folder: Path) -> None:
    """Removes the run that the folder holds, and nothing else that lies in it."""
    remove_leftovers(folder)
    for name in (*RUN_FILES, *RESULT_FILES, "tensorboard", "profile"):
        _remove(folder / name)


def remove_leftovers(folder: Path) -> None:
    """Removes what a run that was killed was writing."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            _remove(path)


def _remove(path: Path) -> None:
    with storing(path):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        aside = path.with_name(path.name.removesuffix(REMOVING) + REMOVING)
        path.rename(aside)  # so that nobody takes for a run what is left of one if this is cut off
        shutil.rmtree(aside)


@dataclass(frozen=True)
class Changes:
    """Settings that a resumed run has otherwise than the run it continues, each with both values.

    Attributes:
        result: those that change its result.
        other: those that do not.
    """

    result: list[str]
    other: list[str]


def changed_settings(run: RunConfig, config_file: Path) -> Changes:
    """Compares with the settings that the run was started with.

    Raises:
        InputError: where they cannot be read.
    """
    try:
        before = _flat(read_yaml(config_file))
    except (InputError, AttributeError) as error:
        raise InputError(
            f"{config_file}: cannot be read, so that the run cannot be resumed with the settings it was started "
            "with; restore it, or start in another folder"
        ) from error
    # What is not in the file is newer than the run, which had the default.
    before, now = _flat(RunConfig(model=run.model).to_dict()) | before, _flat(yaml.safe_load(run.to_yaml()))
    # An adapter that is continued says these itself; earlier versions wrote down what was asked for.
    continues = run.peft.init_from is not None and before.get("peft.init_from") == run.peft.init_from
    untold = {f"peft.{name}" for name in (*STRUCTURE, *BEGINNINGS)} if continues else set()
    changes = Changes([], [])
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name) or name in RESUMING or name in untold:
            continue
        is_free = name in FREE_ON_RESUME or name.startswith("logging.")
        text = f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)"
        (changes.other if is_free else changes.result).append(text)
    return changes


def check_unchanged(run: RunConfig, config_file: Path) -> None:
    """Compares the settings that can change the result with those that the run was started with.

    Raises:
        InputError: naming those that differ, unless `training.resume_changed` allows it.
    """
    changed = changed_settings(run, config_file).result
    if changed and not run.training.resume_changed:
        raise InputError(
            f"{config_file.parent}: cannot be resumed with other settings, which would change its result: "
            f"{'; '.join(changed)}; set them back, or set training.resume_changed true, or start in another folder"
        )


def describe_changes(run: RunConfig, config_file: Path) -> list[str]:
    """Lines that say with which other settings a run is resumed."""
    changes = changed_settings(run, config_file)
    lines = []
    if changes.result:
        lines.append(
            "warning: resuming with other settings, so that the result is not that of one run: "
            f"{'; '.join(changes.result)}"
        )
    if changes.other:
        lines.append(f"resuming with other settings, which do not change the result: {'; '.join(changes.other)}")
    return lines


def _flat(settings: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """`section.key` -> value."""
    return {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
