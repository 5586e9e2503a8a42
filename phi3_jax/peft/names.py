"""`NAME=PATH` of an adapter, or a path alone."""

import os
import re
from pathlib import Path

from phi3_jax.peft.folder import ADAPTER, CHECKPOINTS, MODEL


def named(text: str) -> tuple[str, str]:
    """The name and the path of `NAME=PATH`, or of a path or hub id alone.

    Without a name it is the last part of the path, or the run's where that is only what training calls a part of a
    run, with the step of a checkpoint behind it; letters, digits and any of . _ + - of it.

    Example:
        >>> named("orders=out/adapter")
        ('orders', 'out/adapter')
        >>> named("out/run-3/adapter")
        ('run-3', 'out/run-3/adapter')
        >>> named("out/run-3/checkpoints/40")
        ('run-3-40', 'out/run-3/checkpoints/40')
    """
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name and not os.path.exists(text):
        return name, path
    *_, run, above, last = ("", "", *Path(os.path.abspath(os.path.expanduser(text))).parts)
    if last in (ADAPTER, MODEL):
        last = above
    elif above == CHECKPOINTS:
        last = f"{run}-{last}"
    return re.sub(r"[^\w.+-]", "_", last), text
