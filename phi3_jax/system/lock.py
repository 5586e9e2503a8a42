"""One run or evaluation at a time in an output folder."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from phi3_jax.system.errors import InputError
from phi3_jax.system.files import storing, try_lock

NAME = "run.lock"


@dataclass
class RunLock:
    """A folder held by one process, with a lock on its file `run.lock`.

    The operating system lets go of it when the process ends, however it ends: a file that a killed run
    left behind stops nobody. Its text is for people. Where the file system knows no locks, nothing is
    held (`handle` is None); see docs/reliability.md for which ones tell hosts of each other.
    """

    path: Path
    handle: int | None

    @classmethod
    def take(cls, folder: Path, key: str = "training.output_dir") -> "RunLock":
        """Raises `InputError` where another process holds the folder, which is named by the setting `key`."""
        path = folder / NAME
        while True:
            with storing(path):
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            is_locked = try_lock(handle)
            if is_locked is None:
                os.close(handle)
                return cls(path, None)
            if not is_locked:
                holder = _holder(handle)
                os.close(handle)
                raise InputError(
                    f"{folder}: another run is writing there ({holder}); wait for it, or name another {key}"
                )
            if _is(path, handle):
                break
            os.close(handle)  # its former holder has removed it meanwhile
        text = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with suppress(OSError):  # a full disk shows at what is written next
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(text).encode(), 0)
        return cls(path, handle)

    def release(self) -> None:
        """Removes the file, while it is held, and lets go."""
        if self.handle is not None:
            with suppress(OSError):
                if _is(self.path, self.handle):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None


def check_not_held(folder: Path, key: str = "training.output_dir") -> None:
    """Raises `InputError` where a process holds the folder now; leaves no trace."""
    if (folder / NAME).exists() and os.access(folder / NAME, os.W_OK):
        RunLock.take(folder, key).release()


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        text = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(text['pid'])} on {str(text['host'])[:100]}, since {str(text['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just started"
