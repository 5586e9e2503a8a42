"""Files and folders that are there whole or not at all, and what is said where a disk takes no more."""

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from phi3_jax.system.errors import InputError
from phi3_jax.system.reading import local_path

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
UNIQUE = re.compile(r"[0-9a-f]{32}")  # what a temporary folder's name ends with


class StorageError(InputError):
    """A file cannot be written: the disk is full, or may not be written to, or fails.

    The message names the path, the reason, the space that was needed and what is free there.
    """


def storage_error(path: Path, error: OSError, needed: int | None = None) -> StorageError:
    """What is said of an `error` at writing `path`.

    Args:
        path: What was to be written.
        error: The system's.
        needed: Bytes, where that is known.
    """
    if isinstance(error, StorageError):
        return error
    reason = error.strerror or str(error)
    if error.errno in FULL:
        space = f"{free_bytes(path):,} bytes are free there"
        if needed is not None:
            space = f"{needed:,} bytes are needed, {space}"
        return StorageError(f"{path}: cannot be written ({reason}): {space}; free some, or choose another folder")
    if error.errno in FORBIDDEN:
        return StorageError(f"{path}: cannot be written ({reason}); choose a folder that you may write to")
    return StorageError(f"{path}: cannot be written ({reason}); see to the disk, or choose another folder")


def free_bytes(path: Path) -> int:
    """What this process may still write where `path` is or is to be."""
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    return shutil.disk_usage(there).free


def check_writable(what: str, folder: Path) -> None:
    """Raises `InputError` where a folder to write in cannot be made, or not written to.

    Args:
        what: What the folder is, for the message.
        folder: Is `what`, for the message.
    """
    local_path(folder, what)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise InputError(f"{what} {folder}: {part} is a file, expected a folder; name another one")
    nearest = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{what} {folder}: {nearest} cannot be written to; name another folder")


@contextmanager
def storing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raises what goes wrong at writing within it as a `StorageError` for `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error, needed) from error


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all. Raises `StorageError` where it cannot be written."""
    beside = path.with_name(path.name + ".tmp")
    with storing(path, len(text.encode())):
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def append_line(file: FileIO, path: Path, line: str) -> None:
    """Writes the line at the end of the open, unbuffered file, so that it is not lost with the process.

    Raises:
        StorageError: Where not all of it can be written.
    """
    content = line.encode() + b"\n"
    with storing(path, len(content)):
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def link_or_copy(source: str, target: str) -> None:
    """Another name for a file that nobody will write to, where the disk can have one, else a copy.

    Example:
        >>> import shutil, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "run").mkdir()
        >>> _ = (folder / "run" / "a").write_text("text")
        >>> _ = shutil.copytree(folder / "run", folder / "other", copy_function=link_or_copy)
        >>> (folder / "other" / "a").read_text()
        'text'
    """
    try:
        os.link(source, target)
    except OSError:  # other disks, and those that know no links
        shutil.copy2(source, target)


def sync(path: Path) -> None:
    """Has the file, or the names that the folder holds, on the disk when it returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which some file systems cannot do, since they write names at once
            raise
    finally:
        os.close(handle)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` to write in, removed with what is left in it at the end.

    Those that killed processes left there under the same prefix are removed too. A living process
    holds its own by a lock, so that it stays.

    Args:
        parent: Made where it is missing.
        prefix: Of the folder's name.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for abandoned before it was locked
            continue
        is_locked = try_lock(handle)
        if is_locked is None or (is_locked and folder.exists()):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Locks an open file or folder for as long as it is open: True, or False where somebody else holds it.

    None where the file system knows no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        if not UNIQUE.fullmatch(folder.name.removeprefix(prefix)):
            continue
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # gone meanwhile, or not ours
            continue
        if try_lock(handle):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
