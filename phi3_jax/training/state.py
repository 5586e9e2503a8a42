"""Checkpoints of a run, with Orbax: `checkpoints/<step>/`, written in the background."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from phi3_jax.errors import InputError
from phi3_jax.training.step import TrainState


@dataclass(frozen=True)
class _LatestAndBest:
    """Keeps the newest `limit` checkpoints, the best by `eval_loss` among them; as transformers'
    `save_total_limit`, the newest and the best are kept in any case."""

    limit: int | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        if self.limit is None or len(checkpoints) <= self.limit:
            return [True] * len(checkpoints)
        kept = {checkpoints[-1].step}
        scored = [c for c in checkpoints if c.metrics and "eval_loss" in c.metrics]
        if scored:
            kept.add(min(scored, key=lambda c: c.metrics["eval_loss"]).step)
        for checkpoint in reversed(checkpoints):
            if len(kept) < self.limit:
                kept.add(checkpoint.step)
        return [c.step in kept for c in checkpoints]


class Checkpoints:
    """The checkpoints of a run: training state as arrays, everything else as JSON.

    Half-written checkpoints of a killed process are never read, and removed on opening.

    Several processes open, save and restore together, in a folder that all of them see. There every
    array of a state must be a global one, on all devices or cut over them; each process writes what
    it holds. On which devices it was saved does not matter to what it is restored onto.
    """

    def __init__(self, folder: Path, save_total_limit: int | None):
        # Orbax tells of every single file; a run's console is for the run.
        logging.getLogger("absl").setLevel(logging.ERROR)
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        # Left to choose, Orbax would take a dict of numbers for a tree of arrays.
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="progress")
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_LatestAndBest(save_total_limit),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Those of the complete checkpoints, ascending."""
        return [c.step for c in self._checkpointer.checkpoints]

    def save(self, step: int, state: TrainState, progress: dict[str, Any], eval_loss: float | None) -> None:
        """Starts saving; the arrays are copied from the device before this returns."""
        if step in self.steps:
            return
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": _flatten(state), "progress": progress},
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
        )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step` (default: the newest), with the types, shapes and shardings of
        `like`, and the JSON beside it.

        Raises `InputError` where the checkpoint has other arrays than this run.
        """
        self._checkpointer.wait()
        step = self.steps[-1] if step is None else step
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _flatten(like))
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"state": abstract, "progress": None})
        except (ValueError, KeyError, FileNotFoundError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"{self._checkpointer.directory / str(step)}: does not hold the state of this run ({first}); "
                "remove it to continue from the one before, or start in another folder"
            ) from error
        return _unflatten(like, loaded["state"]), loaded["progress"]

    def wait(self) -> None:
        """Until what was started is on disk; raises what went wrong in the background."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    """Path -> array, keys as their bits: a form that does not depend on the classes of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _bits(leaf) for path, leaf in leaves}


def _unflatten(like: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    def leaf(path: Any, old: jax.Array) -> jax.Array:
        new = arrays[jax.tree_util.keystr(path, simple=True, separator=".")]
        return jax.random.wrap_key_data(new) if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key) else new

    return jax.tree_util.tree_map_with_path(leaf, like)


def _bits(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
