"""Checkpoints of a run: `checkpoints/<step>/`, their arrays and JSON by Orbax, written in the background."""

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from phi3_jax.parallel.distributed import exchange, is_main, together
from phi3_jax.parallel.layout import is_key
from phi3_jax.system.compat_orbax import context_with_json, disk_error
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import StorageError, storage_error, sync
from phi3_jax.system.manifest import Damaged, change_score, check, write_manifest
from phi3_jax.system.text import first_line
from phi3_jax.training.adapter_files import Beside
from phi3_jax.training.checkpoint_names import DAMAGED, REMOVING, SAVING, SUPERSEDED, UNFINISHED
from phi3_jax.training.step import TrainState

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that training waits for a disk in silence


def superfluous(scores: Mapping[int, float | None], limit: int | None) -> list[int]:
    """Which steps' checkpoints to remove, so that `limit` are left: the newest, the one of the best evaluation
    among them. As with transformers' `save_total_limit`, the newest and the best stay in any case.

    Args:
        scores: that of each step that has a checkpoint, the lower the better; None where there was no evaluation.
        limit: how many are to be left, None for all.
    """
    if limit is None or len(scores) <= limit:
        return []
    kept = {max(scores)}
    scored = {step: score for step, score in scores.items() if score is not None}
    if scored:
        kept.add(min(scored, key=lambda step: (scored[step], step)))
    for step in sorted(scores, reverse=True):
        if len(kept) < limit:
            kept.add(step)
    return sorted(scores.keys() - kept)


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written."""

    step: int
    score: float | None
    nbytes: int
    done: "Future[None]"


class Checkpoints:
    """The checkpoints of a run: training state as arrays, everything else as JSON.

    A checkpoint is written as `<step>.saving`, and renamed to `<step>` once all of it is there, with a
    manifest of sizes and hashes; it counts from then on. It is renamed again before it is removed. What a
    killed process left in between is removed on opening. A checkpoint that is not what its manifest says
    is set aside as `<step>.damaged`, with a warning, and nobody reads or removes it.

    Several processes open, save and restore together, in a folder that all of them see. There every
    array of a state must be a global one, on all devices or cut over them; each process writes what
    it holds, and the first one does the rest. On which devices a state was saved does not matter to what
    it is restored onto.

    Args:
        folder: where they lie; made where it is missing.
        save_total_limit: see `superfluous`.
        warn: what takes warnings.

    Raises:
        InputError: where there were checkpoints and all of them are damaged.

    Attributes:
        on_saved: called with the folder of each checkpoint that is whole, in the thread that writes them.
    """

    on_saved: Callable[[Path], None] | None = None

    def __init__(self, folder: Path, save_total_limit: int | None, warn: Callable[[str], None] = logger.warning):
        # Orbax tells of every single file and of every thread; what fails is raised here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._limit, self._warn = folder.absolute(), save_total_limit, warn
        self._context = context_with_json("progress")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: _Saving | None = None
        self._scores: dict[int, float | None] = {}
        self._decide(self._open)

    @property
    def steps(self) -> list[int]:
        """Those of the complete checkpoints, ascending."""
        return sorted(self._scores)

    def save(
        self,
        step: int,
        state: TrainState,
        progress: dict[str, object],
        score: float | None,
        beside: Beside | None = None,
    ) -> None:
        """Starts saving; the arrays are copied from the device before this returns.

        Where `step` is saved already, only its `score` is taken over.

        Args:
            step: Of the state.
            state: What is to be restored.
            progress: The JSON beside it.
            score: Of an evaluation at this step.
            beside: The adapter, which lies in the same folder as PEFT's files.

        Raises:
            StorageError: where this one or the one before cannot be written.
        """
        begin = time.monotonic()
        self.wait()
        if (seconds := time.monotonic() - begin) > PATIENCE:
            self._warn(
                f"warning: training waited {seconds:.0f} s for the checkpoint before to be written; a faster disk, "
                "or fewer checkpoints (training.save_steps), would save that"
            )
        if step in self._scores:
            if score is not None:
                self._decide(lambda: self._take_over(step, score))
            return
        arrays = _flatten(state)
        nbytes = sum(array.nbytes for array in arrays.values()) + (0 if beside is None else beside.nbytes)
        target = self._folder / f"{step}{SAVING}"
        with self._storing(step, nbytes), self._context:
            written = ocp.save_checkpointables_async(target, {"state": arrays, "progress": progress})
        done = self._pool.submit(self._finish, step, score, written.result, beside, dict(self._scores))
        self._saving = _Saving(step, score, nbytes, done)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Mapping[str, Any]]:
        """The state saved at `step`, with the types, shapes and shardings of `like`, and the JSON beside it.

        By default that of the newest checkpoint which is what was written: those that are not are set aside,
        with a warning each.

        Raises:
            InputError: where the checkpoint has other arrays than this run, and where it is damaged or all are.
        """
        self.wait()
        self._decide(lambda: self._check_newest() if step is None else self._check_one(step))
        step = self.steps[-1] if step is None else step
        folder = self._folder / str(step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _flatten(like))
        try:
            with self._context:
                loaded = ocp.load_checkpointables(folder, {"state": abstract, "progress": None})
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"{folder}: does not hold the state of this run ({first_line(error)}); "
                "remove it to continue from the one before, or start in another folder"
            ) from error
        return _unflatten(like, loaded["state"]), loaded["progress"]

    def set_aside_after(self, step: int) -> list[int]:
        """Has the checkpoints of later steps count no more, so that the run can go on from `step`.

        Returns:
            Which they were.
        """
        later = [later for later in self.steps if later > step]

        def set_aside() -> None:
            for old in later:
                self._set_aside(self._folder / str(old), SUPERSEDED)
                del self._scores[old]

        self._decide(set_aside)
        return later

    def wait(self) -> None:
        """Until what was started is on disk; raises what went wrong in the background."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        with together(), self._storing(saving.step, saving.nbytes):
            saving.done.result()
        self._scores[saving.step] = saving.score
        for step in superfluous(self._scores, self._limit):
            del self._scores[step]

    def close(self) -> None:
        """Waits as `wait` does, and lets everything go."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    # In the background.

    def _finish(
        self,
        step: int,
        score: float | None,
        written: Callable[[], None],
        beside: Beside | None,
        scores: dict[int, float | None],
    ) -> None:
        written()  # by all processes
        if not is_main():
            return
        folder = self._folder / f"{step}{SAVING}"
        if beside is not None:
            beside.write(folder)
        write_manifest(folder, score)
        folder.rename(self._folder / str(step))
        sync(self._folder)  # before older ones go
        if self.on_saved is not None:
            self.on_saved(self._folder / str(step))
        for old in superfluous({**scores, step: score}, self._limit):
            self._remove(old)

    def _remove(self, step: int) -> None:
        # Under its own name it is whole or not there.
        aside = self._folder / f"{step}{REMOVING}"
        (self._folder / str(step)).rename(aside)
        shutil.rmtree(aside)

    # What the first process decides, and the others take over.

    def _decide(self, decide: Callable[[], None]) -> None:
        with together():
            if is_main():
                decide()
        text = exchange(json.dumps(list(self._scores.items())))[0]
        self._scores = {int(step): score for step, score in json.loads(text)}

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        found = list(self._folder.iterdir())
        for path in found:
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
        for step in sorted(int(path.name) for path in found if path.name.isdecimal()):
            self._scores[step] = None
            self._check(step, thoroughly=False)
        self._require_one()

    def _check_newest(self) -> None:
        while not self._check(max(self._scores), thoroughly=True):
            self._require_one()

    def _check_one(self, step: int) -> None:
        if step not in self._scores or not self._check(step, thoroughly=True):
            raise InputError(
                f"{self._folder / str(step)}: the checkpoint is damaged or gone; to go on from another one set "
                "training.resume_from_checkpoint true; to take the last weights instead of the best set "
                "training.load_best_model_at_end false and training.resume_changed true"
            )

    def _check(self, step: int, *, thoroughly: bool) -> bool:
        folder = self._folder / str(step)
        try:
            self._scores[step] = check(folder, thoroughly=thoroughly)
        except Damaged as damage:
            aside = self._set_aside(folder, DAMAGED)
            del self._scores[step]
            self._warn(f"warning: {folder}: the checkpoint is damaged ({damage}); it is left out, and kept as {aside}")
            return False
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror}); see to the disk") from error
        return True

    def _set_aside(self, folder: Path, why: str) -> str:
        for number in itertools.count(1):
            aside = folder.with_name(f"{folder.name}{why}{'' if number == 1 else number}")
            if not aside.exists():
                folder.rename(aside)
                return aside.name
        raise AssertionError

    def _require_one(self) -> None:
        damaged = sorted(path.name for path in self._folder.iterdir() if DAMAGED in path.name)
        if damaged and not self._scores:
            raise InputError(
                f"{self._folder}: no checkpoint is left, those that there were are damaged ({', '.join(damaged)}); put "
                "a copy of one in its place, or remove them all to start at step 0"
            )

    def _take_over(self, step: int, score: float) -> None:
        change_score(self._folder / str(step), score)
        self._scores[step] = score

    # What a disk can do.

    def _storing(self, step: int, nbytes: int) -> "_Storing":
        return _Storing(self._folder / str(step), self._folder / f"{step}{SAVING}", nbytes)


@dataclass(frozen=True)
class _Storing:
    """Turns what goes wrong at writing a checkpoint into `StorageError`, and removes what was written of it."""

    path: Path
    temporary: Path
    nbytes: int

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        found = None if error is None or isinstance(error, StorageError) else disk_error(error)
        if found is not None:
            told = storage_error(self.path, found, self.nbytes)
            self._remove_parts()
            raise told from found

    def _remove_parts(self) -> None:
        """They take space that the weights may need now. Orbax's other threads may still be writing some."""
        for _ in range(20):
            parts = list(self.temporary.parent.glob(f"{self.temporary.name}*"))
            if not parts:
                return
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
            time.sleep(0.05)


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    """Path -> array, keys as their bits: a form that does not depend on the classes of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _bits(leaf) for path, leaf in leaves}


def _unflatten(like: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    def leaf(path: tuple[object, ...], old: jax.Array) -> jax.Array:
        new = arrays[jax.tree_util.keystr(path, simple=True, separator=".")]
        return jax.random.wrap_key_data(new) if is_key(old) else new

    state: TrainState = jax.tree_util.tree_map_with_path(leaf, like)
    return state


def _bits(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf
