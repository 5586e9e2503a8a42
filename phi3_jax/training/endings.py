"""How a run ends that cannot go on: which weights are saved where, and what the error says of it."""

from pathlib import Path

import jax
import jax.numpy as jnp

from phi3_jax.config.run import RunConfig
from phi3_jax.system.files import StorageError
from phi3_jax.training import results
from phi3_jax.training.folder import RunFolder
from phi3_jax.training.job import RunJob
from phi3_jax.training.step import TrainState


def rescue(run: RunConfig, job: RunJob, files: RunFolder, state: TrainState, step: int) -> str:
    """Saves the weights as they are in `training.fallback_dir`, after the output folder failed; says what is where."""
    kept, fallback = files.kept(), run.training.fallback_dir
    if not step:
        return kept
    if fallback is None:
        return f"{kept}; training.fallback_dir would name a folder for the weights of step {step}"
    folder = Path(fallback) / f"{files.path.absolute().name}-step{step}"
    try:
        target = results.save_weights(folder, run, job, state.trainable)
    except StorageError as error:
        return f"{kept}; nor can the weights of step {step} be saved in training.fallback_dir: {error}"
    return f"{kept}; the weights of step {step} are in {target}"


def not_finite(run: RunConfig, job: RunJob, files: RunFolder, state: TrainState, step: int, why: str) -> Exception:
    """Saves the last adapter that is known to be good; the error that ends the run at `step`."""
    skips = jax.device_get(state.skips)
    if skips.taken(step) == 0:
        saved = "no step was taken, so there is no adapter to save"
    elif state.good is None:
        saved = files.kept()
    else:
        target = results.save_weights(files.path, run, job, state.good)
        started = skips.last_taken(step) + 1
        saved = f"{target} holds the adapter that step {started} started from, the last one with a finite loss"
    return FloatingPointError(f"step {step}: {why}; {saved}; {_advice(run, job, int(skips.taken(step)))}")


def _advice(run: RunConfig, job: RunJob, taken: int) -> str:
    """What to do about numbers that are not finite: the base's weights are, or it would not have been loaded."""
    advice = []
    if job.dtype == jnp.float16:
        advice.append("give model.dtype bfloat16 or float32, whose numbers reach further than float16's")
    if taken:
        advice.append("lower training.learning_rate")
    if not run.training.debug_nans:
        advice.append("have training.debug_nans: true name the layer")
    return ", or ".join(advice) or "see what the warnings name"
