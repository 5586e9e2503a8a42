"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from phi3_jax.config.run import RunConfig
from phi3_jax.system.compat import EventFile
from phi3_jax.system.files import append_line, storing, write_text
from phi3_jax.system.numbers import is_number


class Stopwatch:
    """Counts seconds while it runs."""

    def __init__(self) -> None:
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> float:
        """The seconds since the start, 0 where it does not run."""
        since, self._since = self._since, None
        return 0.0 if since is None else time.perf_counter() - since


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard and Weights & Biases where asked for.

    **Arguments**: `keep_rows`, lines of metrics.jsonl that stay: those after the checkpoint are written
    again. `writes`, whether this process writes at all.

    Raises `StorageError` where a file cannot be written.
    """

    def __init__(self, folder: Path, run: RunConfig, *, keep_rows: int, writes: bool = True):
        self.path = folder / "metrics.jsonl"
        self.history: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        self._tensorboard: TensorBoard | None = None
        self._wandb: Any = None
        if writes:
            self._open(folder, run, keep_rows)

    def _open(self, folder: Path, run: RunConfig, keep_rows: int) -> None:
        self.history = _first_rows(self.path, keep_rows)
        with storing(self.path):
            self._file = FileIO(self.path, "a")
        step = self.history[-1]["step"] if self.history else 0
        if run.logging.tensorboard:
            self._tensorboard = TensorBoard(folder / "tensorboard", step)
        if run.logging.wandb:
            import wandb

            settings = yaml.safe_load(run.to_yaml())  # which has no tokens
            self._wandb = wandb.init(
                project=run.logging.wandb_project, name=run.logging.run_name, config=settings, dir=str(folder)
            )

    def write(self, row: dict[str, Any]) -> None:
        """One line; `row` has its `step`. Nothing where another host writes."""
        self.history.append(row)
        if self._file is None:
            return
        append_line(self._file, self.path, json.dumps(row))
        step, values = row["step"], {name: value for name, value in row.items() if name != "step"}
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


class TensorBoard:
    """An event file in `folder`, written row by row.

    **Arguments**: `step`, the last one that earlier files in the folder hold and that counts.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        with storing(folder):
            folder.mkdir(exist_ok=True)
            self._file = EventFile(folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}")
            if step:
                self._file.restart(step + 1)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Raises `StorageError` where it cannot."""
        with storing(self._folder):
            for name, value in values.items():
                if is_number(value):
                    place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                    self._file.scalar(step, place, value)
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed, or has said why not
            self._file.close()


def _first_rows(path: Path, number: int) -> list[dict[str, Any]]:
    """Cuts the file to its first lines, fewer where there are not so many rows: those after the checkpoint
    are written again."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:number] if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
