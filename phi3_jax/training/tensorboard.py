"""A run's figures in TensorBoard's event files."""

import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from phi3_jax.system.compat import EventFile
from phi3_jax.system.files import storing


class TensorBoard:
    """An event file in `folder`, written row by row.

    Args:
        folder: where it is to lie; made where it is missing.
        step: the last one that earlier files in the folder hold and that counts.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        with storing(folder):
            folder.mkdir(exist_ok=True)
            self._file = EventFile(folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}")
            if step:
                self._file.restart(step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row.

        Raises:
            StorageError: where it cannot be written.
        """
        with storing(self._folder):
            for name, value in values.items():
                place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._file.scalar(step, place, value)
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed, or has said why not
            self._file.close()
