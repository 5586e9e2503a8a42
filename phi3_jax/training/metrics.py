"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Protocol

import yaml

from phi3_jax.config.run import RunConfig
from phi3_jax.system.files import append_line, storing, write_text
from phi3_jax.training.tensorboard import TensorBoard

Row = dict[str, float]  # a line of metrics.jsonl; `step` and counts are whole numbers


class WandbRun(Protocol):
    """`wandb.Run`."""

    def log(self, data: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases where asked for.

    Args:
        folder: the run's.
        run: whose `logging` says where rows go.
        keep_rows: lines of metrics.jsonl that stay; those after the checkpoint are written again.
        writes: whether this process writes at all.

    Attributes:
        path: metrics.jsonl.
        history: the rows so far.

    Raises:
        StorageError: where a file cannot be written.
    """

    def __init__(self, folder: Path, run: RunConfig, *, keep_rows: int, writes: bool = True):
        self.path = folder / "metrics.jsonl"
        self.history: list[Row] = []
        self._file: FileIO | None = None
        self._tensorboard: TensorBoard | None = None
        self._wandb: WandbRun | None = None
        if writes:
            self._open(folder, run, keep_rows)

    def _open(self, folder: Path, run: RunConfig, keep_rows: int) -> None:
        self.history = _first_rows(self.path, keep_rows)
        with storing(self.path):
            self._file = FileIO(self.path, "a")
        step = int(self.history[-1]["step"]) if self.history else 0
        if run.logging.tensorboard:
            self._tensorboard = TensorBoard(folder / "tensorboard", step)
        if run.logging.wandb:
            import wandb

            settings = yaml.safe_load(run.to_yaml())  # which has no tokens
            self._wandb = wandb.init(
                project=run.logging.wandb_project, name=run.logging.run_name, config=settings, dir=str(folder)
            )

    def write(self, row: Row) -> None:
        """One line; `row` has its `step`. Nothing where another host writes."""
        self.history.append(row)
        if self._file is None:
            return
        append_line(self._file, self.path, json.dumps(row))
        step, values = int(row["step"]), {name: value for name, value in row.items() if name != "step"}
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Has what was written on the disk, before a checkpoint counts on it."""
        if self._file is not None:
            with storing(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _first_rows(path: Path, number: int) -> list[Row]:
    """Cuts the file to its first lines, fewer where there are not so many rows: those after the checkpoint
    are written again."""
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n")[:number] if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
