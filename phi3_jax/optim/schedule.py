"""Learning rates by step: those of transformers' `get_scheduler`.

The formulas are transformers', in Python's own numbers, so that a restart falls on the very step that it
falls on there.
"""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from phi3_jax.config.schedules import (
    Constant,
    Cosine,
    CosineWarmupWithMinLr,
    CosineWithMinLr,
    CosineWithRestarts,
    InverseSqrt,
    Linear,
    Polynomial,
    Settings,
    WarmupStableDecay,
)
from phi3_jax.config.training import TrainingSection
from phi3_jax.system.errors import InputError

# Those of a table: some seconds to reckon, and 40 MB of the compiled step.
MOST_STEPS = 10_000_000


def warmup_steps(training: TrainingSection, total_steps: int) -> int:
    """`warmup_steps` where it is above 0, else `warmup_ratio` of all steps; a share is rounded up."""
    if training.warmup_steps >= 1:
        return int(training.warmup_steps)
    return math.ceil(total_steps * (training.warmup_steps or training.warmup_ratio))


def make_schedule(training: TrainingSection, total_steps: int) -> optax.Schedule:
    """The learning rate of each optimizer step, counted from 0: transformers' `get_scheduler`.

    All but `constant` rise from 0 at the first step over the warm-up, `cosine_warmup_with_min_lr` from one
    step's rise, and `warmup_stable_decay` from its `min_lr_ratio`; then they go as `factor` says.

    Raises:
        InputError: There are too many steps for a rate of each to be kept.
    """
    settings, peak = training.schedule, training.learning_rate
    warmup = 0 if training.lr_scheduler_type == "constant" else warmup_steps(training, total_steps)
    if settings == Cosine():
        return _cosine(peak, warmup, total_steps)
    # After the last entry the rate stays as it is.
    length = warmup + 1 if isinstance(settings, Constant) else max(1, total_steps)
    if length > MOST_STEPS:
        raise InputError(
            f"training.lr_scheduler_type is {training.lr_scheduler_type}, which keeps the rates of at most "
            f"{MOST_STEPS:,} steps, and there are {total_steps:,}; take fewer, or cosine or constant"
        )
    table = [peak * factor(settings, step, warmup, total_steps, peak) for step in range(length)]
    return partial(_looked_up, np.array(table, np.float32))


def _looked_up(table: Float[np.ndarray, "steps"], step: Int[Array, ""]) -> Float[Array, ""]:
    found: Float[Array, ""] = jnp.asarray(table).at[jnp.asarray(step)].get(mode="clip")
    return found


def _cosine(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    """The usual one in float32, off by no more than float32 of the peak: runs that have it keep their every bit."""

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = (step - warmup) / max(1, total_steps - warmup)
        falling = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        return peak * jnp.where(step < warmup, step / max(1, warmup), falling)

    return schedule


def factor(settings: Settings, step: int, warmup: int, total_steps: int, peak: float) -> float:
    """The share of the peak that a step has.

    Args:
        settings: The schedule's.
        step: Counted from 0, below `total_steps`.
        warmup: Steps of the warm-up.
        total_steps: Steps of the run.
        peak: The learning rate of which it is a share.

    Example:
        >>> [round(factor(CosineWithRestarts(2), step, 0, 4, 1e-4), 2) for step in range(4)]
        [1.0, 0.5, 1.0, 0.5]
    """
    if isinstance(settings, WarmupStableDecay):
        return _warmup_stable_decay(settings, step, warmup, total_steps)
    if step < warmup:
        return _rising(settings, step, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    match settings:
        case Constant():
            return 1.0
        case Linear():
            return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
        case Cosine(num_cycles=cycles):
            return max(0.0, _wave(cycles, progress))
        case CosineWithRestarts(num_cycles=cycles):
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(cycles) * progress) % 1.0))))
        case CosineWithMinLr():
            rate = settings.min_lr_rate
            if settings.min_lr is not None:
                rate = settings.min_lr / peak
            assert rate is not None
            if isinstance(settings, CosineWarmupWithMinLr):
                progress = (step - warmup + 1.0) / max(1.0, total_steps - warmup)
            return max(0.0, _wave(settings.num_cycles, progress) * (1 - rate) + rate)
        case Polynomial(lr_end=end, power=power):
            left: float = (1 - (step - warmup) / (total_steps - warmup)) ** power
            return ((peak - end) * left + end) / peak
        case InverseSqrt():
            timescale = (warmup or 10_000) if settings.timescale is None else settings.timescale
            return 1.0 / math.sqrt((step + (timescale - warmup)) / timescale)


def _rising(settings: Settings, step: int, warmup: int) -> float:
    if not isinstance(settings, CosineWarmupWithMinLr):
        return step / max(1, warmup)
    first = settings.warmup_lr_rate
    if first is None:
        return (step + 1.0) / max(1.0, warmup)
    return first + (1.0 - first) * step / max(1, warmup - 1)


def _warmup_stable_decay(settings: WarmupStableDecay, step: int, warmup: int, total_steps: int) -> float:
    decay, stable, least = settings.num_decay_steps, settings.num_stable_steps, settings.min_lr_ratio
    if stable is None:
        stable = total_steps - warmup - decay
    if step < warmup:
        progress = step / max(1, warmup)
        rise = {
            "linear": progress,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * progress)),
            "1-sqrt": 1.0 - math.sqrt(1.0 - progress),
        }[settings.warmup_type]
        return max(0.0, rise * (1.0 - least) + least)
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + decay:
        return least
    progress = (step - warmup - stable) / max(1, decay)
    fall = {
        "linear": 1.0 - progress,
        "cosine": _wave(settings.num_cycles, progress),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[settings.decay_type]
    return max(0.0, fall * (1.0 - least) + least)


def _wave(cycles: float, progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * progress))
