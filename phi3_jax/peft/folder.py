"""Which folder an adapter's path means: the adapter's own, or a run's."""

from pathlib import Path

from phi3_jax.peft.config import CONFIG_FILE
from phi3_jax.system import manifest
from phi3_jax.system.errors import InputError

# What a run writes, and where in it.
ADAPTER, MODEL, CHECKPOINTS, RUN_CONFIG = "adapter", "model", "checkpoints", "config.yaml"
# The training state in a checkpoint of a run.
STATE = "state"


def adapter_folder(folder: Path) -> Path:
    """The folder with adapter_config.json that a path stands for: itself, or the `adapter` of a run.

    Args:
        folder: An adapter's, a run's, or a checkpoint's of a run.

    Raises:
        InputError: For a run that has no adapter, and for the folder of its checkpoints, naming what there is.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / "adapter").mkdir()
        >>> _ = (run / "adapter" / "adapter_config.json").write_text("{}")
        >>> adapter_folder(run) == adapter_folder(run / "adapter") == run / "adapter"
        True
    """
    if (folder / CONFIG_FILE).exists():
        return folder
    if (folder / ADAPTER / CONFIG_FILE).exists():
        return folder / ADAPTER
    if (folder / RUN_CONFIG).is_file() and (folder / MODEL).is_dir():
        raise InputError(
            f"{folder}: is a run that trained the whole model and no adapter; give {folder / MODEL} as the model"
        )
    if folder.name == CHECKPOINTS and (steps := steps_in(folder)):
        raise InputError(
            f"{folder}: holds the checkpoints of a run; give one of them, such as {folder / str(steps[-1])}"
        )
    if steps := steps_in(folder / CHECKPOINTS):
        raise InputError(
            f"{folder}: is a run that has not come to its end, where it writes its adapter; give one of its "
            f"checkpoints, such as {folder / CHECKPOINTS / str(steps[-1])}, or resume it"
        )
    return folder


def steps_in(checkpoints: Path) -> list[int]:
    """Those that the folders of a run's checkpoints are called by, in order."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint of a run, which holds the state of training."""
    return (folder / STATE).is_dir() and (folder / manifest.NAME).is_file()
