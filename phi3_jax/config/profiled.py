"""Which steps of a run are recorded, as `logging.profile` says it."""

import re

from phi3_jax.config.ranges import MOST
from phi3_jax.system.errors import InputError
from phi3_jax.system.text import counted

_RANGE = re.compile(r"\s*(\d{1,18})\s*:\s*(\d{1,18})\s*")


def profiled_steps(text: str) -> range:
    """The steps of `FIRST:END`, counted from 1, END no longer among them.

    Raises:
        InputError: For anything else, and where there are no such steps.

    Example:
        >>> list(profiled_steps("10:13"))
        [10, 11, 12]
        >>> profiled_steps("13:10")
        Traceback (most recent call last):
            ...
        phi3_jax.system.errors.InputError: logging.profile is 13:10, which ends before it begins; give 10:13
    """
    found = _RANGE.fullmatch(text)
    if found is None:
        raise InputError(
            f"logging.profile is {text!r}, expected two numbers of steps, the first and the one to stop before: "
            "10:13 for steps 10 to 12"
        )
    first, end = int(found[1]), int(found[2])
    if first < 1:
        raise InputError(f"logging.profile is {text}, but steps are counted from 1; give 1:{max(end, 2)}")
    if end > MOST:
        raise InputError(f"logging.profile is {text}, expected steps up to {MOST:,}")
    if end < first:
        raise InputError(f"logging.profile is {text}, which ends before it begins; give {end}:{first}")
    if end == first:
        raise InputError(f"logging.profile is {text}, which is no step; give {first}:{first + 1} for step {first}")
    return range(first, end)


def check_steps_come(steps: range, total: int) -> None:
    """Looks whether a run of `total` steps comes to all of these.

    Raises:
        InputError: It does not.

    Example:
        >>> check_steps_come(range(10, 13), total=12)
        >>> check_steps_come(range(10, 13), total=2)
        Traceback (most recent call last):
            ...
        phi3_jax.system.errors.InputError: logging.profile is 10:13, but the run has 2 steps; give steps up to 3, as 1:3
    """
    if steps.stop - 1 > total:
        first = max(1, total + 1 - len(steps))
        raise InputError(
            f"logging.profile is {steps.start}:{steps.stop}, but the run has {counted(total, 'step')}; give steps up "
            f"to {total + 1}, as {first}:{total + 1}"
        )
