"""What the folders of checkpoints are called: by their step, and how those that do not count."""

import re
from pathlib import Path

from phi3_jax.peft.folder import CHECKPOINTS, steps_in

# What follows the step while it does not count, and where it does not count any more.
SAVING, REMOVING, DAMAGED, SUPERSEDED = ".saving", ".removing", ".damaged", ".superseded"
# What a killed process leaves behind.
UNFINISHED = re.compile(rf"\d+({re.escape(SAVING)}|{re.escape(REMOVING)}).*")


def steps_of(run: Path) -> list[int]:
    """Those of the checkpoints in a run's folder, in order; damaged ones are among them, as long as nobody has looked.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> for name in ("100", "20", "120.saving"):
        ...     (run / "checkpoints" / name).mkdir(parents=True)
        >>> steps_of(run)
        [20, 100]
    """
    return steps_in(run / CHECKPOINTS)
