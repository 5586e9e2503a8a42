"""Where a run that is resumed goes on from: its own newest checkpoint, or a folder that it is given."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.config.training import TrainingSection
from phi3_jax.peft.folder import CHECKPOINTS
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import link_or_copy, storing
from phi3_jax.training.checkpoint_names import SAVING, steps_of

KEY = "training.resume_from_checkpoint"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        run: The folder of the run that saved it.
        step: Its step; None for the newest whole one, if there is any.
        is_own: Whether that run is the one that goes on.
    """

    run: Path
    step: int | None
    is_own: bool

    @classmethod
    def of(cls, training: TrainingSection) -> "ResumePoint | None":
        """What `resume_from_checkpoint` means; None where the run begins at its start.

        Raises:
            InputError: It is a folder that holds no checkpoint of a run.
        """
        value, output = training.resume_from_checkpoint, Path(training.output_dir)
        if not value:
            return None
        if value is True:
            return cls(output, None, True)
        run, step = _find(Path(value))
        is_own = run.resolve() == output.resolve()
        if step is None and not is_own:
            step = max(steps_of(run))
        return cls(run, step, is_own)

    @property
    def config(self) -> Path:
        """The settings of the run that saved it."""
        return self.run / "config.yaml"

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(steps_of(self.run))

    def adopt(self, output: Path) -> None:
        """Makes another run's checkpoints up to this one, with its lines of metrics, those of `output`.

        So its best one is there too, to be loaded at the end. Files are links where the disk can have them, since
        nobody writes to those of a checkpoint.
        """
        assert self.step is not None
        for step in steps_of(self.run):
            if step > self.step:
                continue
            target = output / CHECKPOINTS / str(step)
            beside = target.with_name(f"{step}{SAVING}")  # until it is whole
            with storing(target):
                shutil.copytree(self.run / CHECKPOINTS / str(step), beside, copy_function=link_or_copy)
                beside.rename(target)
        if (metrics := self.run / "metrics.jsonl").is_file():
            with storing(output / metrics.name):
                shutil.copyfile(metrics, output / metrics.name)


def _find(path: Path) -> tuple[Path, int | None]:
    """The run's folder and the step that a path names."""
    if path.name.isdecimal() and path.absolute().parent.name == CHECKPOINTS and path.is_dir():
        return path.absolute().parents[1], int(path.name)
    for run in (path, path.absolute().parent):
        if (run == path or path.name == CHECKPOINTS) and steps_of(run):
            return run, None
    if not path.exists():
        why = "which is not there"
    elif (path / "trainer_state.json").is_file():
        raise InputError(
            f"{KEY} is {path}, a checkpoint of transformers' Trainer, whose optimizer is another one; to start from "
            "its adapter, give it as peft.init_from"
        )
    else:
        why = "which holds no checkpoint of a run"
    raise InputError(f"{KEY} is {path}, {why}; give a folder such as out/{CHECKPOINTS}/100, or a run's, or true")
