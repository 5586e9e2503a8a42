"""The settings of each learning-rate schedule of transformers: what `training.lr_scheduler_kwargs` may hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from phi3_jax.system.errors import InputError

Value = int | float | str | None
Course = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class Constant:
    """`constant`, without warm-up, and `constant_with_warmup`."""


@dataclass(frozen=True)
class Linear:
    """`linear`: to 0."""


@dataclass(frozen=True)
class Cosine:
    """`cosine`.

    Attributes:
        num_cycles: Waves; the half one falls to 0.
    """

    num_cycles: float = 0.5


@dataclass(frozen=True)
class CosineWithRestarts:
    """`cosine_with_restarts`.

    Attributes:
        num_cycles: How often it falls to 0, from the peak each time.
    """

    num_cycles: float = 1


@dataclass(frozen=True)
class CosineWithMinLr:
    """`cosine_with_min_lr`: to one of the two, which has to be given.

    Attributes:
        num_cycles: As for `cosine`.
        min_lr: The learning rate at the end.
        min_lr_rate: The same as a share of the peak.
    """

    num_cycles: float = 0.5
    min_lr: float | None = None
    min_lr_rate: float | None = None


@dataclass(frozen=True)
class CosineWarmupWithMinLr(CosineWithMinLr):
    """`cosine_warmup_with_min_lr`: the same a step earlier, and the warm-up does not begin at 0.

    Attributes:
        num_cycles: As for `cosine`.
        min_lr: The learning rate at the end.
        min_lr_rate: The same as a share of the peak.
        warmup_lr_rate: The share of the peak that the warm-up begins at; null for one step's rise.
    """

    warmup_lr_rate: float | None = None


@dataclass(frozen=True)
class Polynomial:
    """`polynomial`.

    Attributes:
        lr_end: The learning rate at the end.
        power: Of the share of steps left.
    """

    lr_end: float = 1e-7
    power: float = 1.0


@dataclass(frozen=True)
class InverseSqrt:
    """`inverse_sqrt`.

    Attributes:
        timescale: Steps; null for those of the warm-up, or 10,000 without one.
    """

    timescale: int | None = None


@dataclass(frozen=True)
class WarmupStableDecay:
    """`warmup_stable_decay`: rises, stays, and falls in the last `num_decay_steps`, which have to be given.

    Attributes:
        num_decay_steps: Steps in which it falls.
        num_stable_steps: Steps at the peak; null for all that the others leave.
        warmup_type: How it rises.
        decay_type: How it falls.
        min_lr_ratio: The share of the peak that it rises from and falls to.
        num_cycles: Waves of a cosine that falls.
    """

    num_decay_steps: int
    num_stable_steps: int | None = None
    warmup_type: Course = "linear"
    decay_type: Course = "cosine"
    min_lr_ratio: float = 0
    num_cycles: float = 0.5


Settings = (
    Constant
    | Linear
    | Cosine
    | CosineWithRestarts
    | CosineWithMinLr
    | CosineWarmupWithMinLr
    | Polynomial
    | InverseSqrt
    | WarmupStableDecay
)
SCHEDULES: dict[str, type[Settings]] = {
    "constant": Constant,
    "constant_with_warmup": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "cosine_with_min_lr": CosineWithMinLr,
    "cosine_warmup_with_min_lr": CosineWarmupWithMinLr,
    "polynomial": Polynomial,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
}
KEY = "training.lr_scheduler_kwargs"


def schedule_settings(name: str, kwargs: Mapping[str, Value] | None, learning_rate: float) -> Settings:
    """What `training.lr_scheduler_type` and `training.lr_scheduler_kwargs` say together.

    Args:
        name: The schedule.
        kwargs: Its settings, under transformers' names.
        learning_rate: The peak.

    Raises:
        InputError: Where the schedule has no such setting, the value is none for it, or one is missing.

    Example:
        >>> schedule_settings("cosine_with_restarts", {"num_cycles": 3}, 1e-4)
        CosineWithRestarts(num_cycles=3)
        >>> schedule_settings("cosine", {"cycles": 3}, 1e-4)
        Traceback (most recent call last):
            ...
        phi3_jax.system.errors.InputError: training.lr_scheduler_kwargs has cycles, and cosine takes num_cycles
    """
    kwargs, cls = kwargs or {}, SCHEDULES[name]
    hints = get_type_hints(cls)
    for key, value in kwargs.items():
        if key not in hints:
            raise InputError(f"{KEY} has {key}, and {name} takes {', '.join(hints) or 'no settings'}")
        _check(key, value, get_args(hints[key]) or (hints[key],))
    if cls is WarmupStableDecay and "num_decay_steps" not in kwargs:
        raise InputError(f"{KEY} has no num_decay_steps, which {name} needs: the steps in which it falls; give it")
    make: Callable[..., Settings] = cls
    settings = make(**kwargs)
    if isinstance(settings, CosineWithMinLr):
        _check_least(name, settings, learning_rate)
    if isinstance(settings, Polynomial) and settings.lr_end >= learning_rate:
        raise InputError(
            f"{KEY}.lr_end is {settings.lr_end}, to which training.learning_rate {learning_rate} cannot fall; lower it"
        )
    return settings


def _check(key: str, value: Value, wanted: Sequence[object]) -> None:
    """`wanted` are types, or the words that it may be."""
    if value is None and type(None) in wanted:
        return
    if isinstance(wanted[0], str):
        if value not in wanted:
            raise InputError(f"{KEY}.{key} is {value!r}, expected one of {', '.join(map(str, wanted))}")
        return
    least, whole = int(key == "timescale"), "whole " if int in wanted else ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf
    if not is_number or (whole and value != round(float(value or 0))):
        raise InputError(f"{KEY}.{key} is {value!r}, expected a {whole}number of at least {least}")


def _check_least(name: str, settings: CosineWithMinLr, learning_rate: float) -> None:
    least, rate = settings.min_lr, settings.min_lr_rate
    if least is not None and rate is not None:
        raise InputError(f"{KEY} has min_lr {least} and min_lr_rate {rate}; leave one of them out")
    if least is None and rate is None:
        raise InputError(f"{KEY} has neither min_lr nor min_lr_rate, and {name} needs one of them; give it")
    if least is not None and learning_rate == 0:
        raise InputError(f"{KEY}.min_lr is {least}, but training.learning_rate is 0; raise it, or give min_lr_rate")
