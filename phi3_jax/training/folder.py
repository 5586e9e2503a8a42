"""A run's output folder while the run goes on: held by a lock, opened for checkpoints and metrics, let go."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3_jax.config.run import RunConfig
from phi3_jax.parallel.distributed import is_main, together
from phi3_jax.system.files import StorageError, storing, write_text
from phi3_jax.system.lock import RunLock
from phi3_jax.training import checks
from phi3_jax.training.checkpoint_names import SUPERSEDED
from phi3_jax.training.checkpoints import Checkpoints
from phi3_jax.training.metrics import MetricsLog
from phi3_jax.training.resume import ResumePoint
from phi3_jax.training.step import TrainState
from phi3_jax.training.versions import write_versions


class RunFolder:
    """Holds a run's output folder.

    Args:
        run: whose `training.output_dir` it is.
        say: what takes lines for the console.

    Attributes:
        path: the folder.
        point: what the run goes on from, None where it begins at its start.
        checkpoints: None where there are none and none are to be.
    """

    def __init__(self, run: RunConfig, say: Callable[[str], None]):
        self.path = Path(run.training.output_dir)
        self.point = ResumePoint.of(run.training)
        self.checkpoints: Checkpoints | None = None
        self._log: MetricsLog | None = None
        self._run, self._say = run, say
        self._lock: RunLock | None = None

    def open(self) -> None:
        """Takes the folder for this run, and opens the checkpoints that it holds or is to hold.

        Raises:
            InputError: where another run holds it, where its checkpoints are all damaged, and where the hosts do not
                see the same one.
        """
        with together():
            if is_main():
                self._take()
        with together():
            checks.check_shared(self.path / "config.yaml", self._run.to_yaml())
        if self._run.training.save_strategy != "no" or (self.path / "checkpoints").is_dir():
            self.open_checkpoints()

    def _take(self) -> None:
        training = self._run.training
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock.take(self.path)
        if self._lock.handle is None:
            self._say(f"warning: {self.path} cannot be locked; see to it that no other run writes there")
        checks.check_output_folder(self._run, held=True)  # once more: another run may have been there meanwhile
        point = self.point
        if training.overwrite_output_dir and not (point is not None and point.is_own):
            checks.remove_run(self.path)
        if point is not None and point.exists:
            for line in checks.describe_changes(self._run, point.config):
                self._say(line)
        checks.remove_leftovers(self.path)
        if point is not None and not point.is_own:
            point.adopt(self.path)
        write_text(self.path / "config.yaml", self._run.to_yaml())
        changes = write_versions(self.path / "versions.json")
        if changes is not None:
            self._say(f"warning: resuming with other versions, so that the last bits may differ: {changes}")

    def restore(self, like: TrainState) -> tuple[TrainState, Mapping[str, Any]] | None:
        """What the run goes on from, and the JSON beside it, as `Checkpoints.restore`; None where there is nothing.

        Raises:
            InputError: where it is damaged, or not of such a run.
        """
        if self.point is None or self.checkpoints is None or not self.checkpoints.steps:
            return None
        return self.checkpoints.restore(like, self.point.step)

    def set_aside_later(self) -> None:
        """Has this run's checkpoints count no more that are later than the one it goes on from."""
        if self.point is None or self.point.step is None or self.checkpoints is None:
            return
        if later := self.checkpoints.set_aside_after(self.point.step):
            self._say(
                f"warning: {self.path}: the run goes on from step {self.point.step}; the checkpoints of later steps "
                f"({', '.join(map(str, later))}) are kept under names that end with {SUPERSEDED}"
            )

    def give_up(self) -> None:
        """Removes what was taken over from another run, which could not be gone on with."""
        if self.point is not None and not self.point.is_own and is_main():
            checks.remove_run(self.path)

    def open_checkpoints(self) -> Checkpoints:
        """Opens them where they are not open yet: a run that is stopped saves one, whatever was wanted."""
        if self.checkpoints is None:
            limit = self._run.training.save_total_limit
            self.checkpoints = Checkpoints(self.path / "checkpoints", limit, self._say)
        return self.checkpoints

    @property
    def log(self) -> MetricsLog:
        """The metrics, once they are open."""
        assert self._log is not None
        return self._log

    def open_metrics(self, rows: int) -> int:
        """Opens metrics.jsonl behind its first `rows` lines.

        Returns:
            How many there are: fewer where some are lost, with a warning.
        """
        with together():
            self._log = MetricsLog(self.path, self._run, keep_rows=rows, writes=is_main())
        found = len(self.log.history) if is_main() else rows
        if found < rows:
            self._say(
                f"warning: {self.log.path} has only {found} of the {rows} lines up to the checkpoint; the others "
                "are lost"
            )
        return found

    def kept(self) -> str:
        """Which checkpoint there is to go on from, in words; waits for the one that is being written."""
        if self.checkpoints is not None:
            with suppress(StorageError):
                self.checkpoints.wait()
        newest = self.checkpoints.steps[-1:] if self.checkpoints is not None else []
        return f"the checkpoint of step {newest[0]} is whole" if newest else "there is no checkpoint"

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and lets the folder go."""
        try:
            for part in (self.checkpoints, self._log):
                if part is not None:
                    part.close()
        finally:
            if self._lock is not None:
                self._lock.release()
