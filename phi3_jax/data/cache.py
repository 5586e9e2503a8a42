"""Prepared rows kept on the disk, so that the next run with the same ones begins in seconds.

An entry is a folder under the hub's own cache, named by all that its rows depend on (`row_key`). It comes to be whole
or not at all, holds plain arrays and JSON, is read through memory maps, and is looked through before it is used; one
that is damaged is made again. No trouble with it ends a run.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from phi3_jax.data.row_arrays import TYPES, from_arrays, to_arrays
from phi3_jax.data.rows import DataStats, TokenizedRows
from phi3_jax.parallel.distributed import exchange, is_main
from phi3_jax.system.errors import InputError
from phi3_jax.system.files import free_bytes, storage_error, temporary_folder
from phi3_jax.system.manifest import Damaged, check, write_manifest
from phi3_jax.system.reading import check_file, read_json
from phi3_jax.system.telling import tell
from phi3_jax.system.text import first_line

LEAST_SECONDS = 3.0  # rows that took less are prepared again as fast as they are found
# Bytes of all entries: ten sets of a million chats of 300 tokens, which take 5 bytes each and some more for answers.
# Phi-3-medium's checkpoint, which may lie in the hub's cache beside them, has 28 GB.
MAX_BYTES = 20 * 2**30
_STATS = "rows.json"
_NEW, _OLD = "new-", "old-"  # prefixes of folders that are being written, and taken away


def cache_folder() -> Path:
    """Where entries lie."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "phi3_jax" / "prepared"


def cached_rows(
    name: Callable[[], str | None], make: Callable[[], TokenizedRows], *, vocabulary: int = 2**31
) -> TokenizedRows:
    """The rows that the cache has under a name, or those that are made, which it is then given.

    Several processes take them from their caches where all have them, and else make them together.

    Args:
        name: Gives the name; None where they have none. Only asked where it matters, since it has its cost.
        make: Makes the rows.
        vocabulary: What every id is below.

    Raises:
        InputError: As `make` does, and for nothing else.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> def make():
        ...     print("made")
        ...     return TokenizedRows(*map(np.array, ([5], [1], [0, 1], [0])), [""], DataStats())
        >>> rows = cached_rows(lambda: None, make)
        made
    """
    folder, begun = cache_folder(), time.monotonic()
    key = name() if folder.is_dir() else None
    found = None if key is None else _look_up(folder / key, vocabulary)
    if exchange("found" if found is not None else "missing").count("missing") == 0 and found is not None:
        tell(f"{len(found):,} rows taken from the cache ({folder / str(key)}), {time.monotonic() - begun:.1f} s")
        return found
    begun = time.monotonic()
    made = make()
    is_worth_it = max(map(float, exchange(str(time.monotonic() - begun)))) >= LEAST_SECONDS
    if is_worth_it and (key := name()) is not None:
        _keep_once(folder / key, made)
    return made


def _look_up(entry: Path, vocabulary: int) -> TokenizedRows | None:
    try:
        if not entry.is_dir():
            return None
        rows = read_entry(entry, vocabulary=vocabulary)
    except (Damaged, InputError, OSError, ValueError) as error:
        tell(f"{entry}: is damaged ({first_line(error)}); the rows are prepared anew")
        _take_away(entry)
        return None
    with suppress(OSError):  # a folder that is not to be written to
        os.utime(entry)  # used last
    return rows


def _keep_once(entry: Path, rows: TokenizedRows) -> None:
    """The first of several processes keeps them, then those others that do not see its entry: their disks are own."""
    if is_main():
        _keep(entry, rows)
    exchange("kept")
    if not is_main() and not entry.is_dir():
        _keep(entry, rows)


def _keep(entry: Path, rows: TokenizedRows) -> None:
    nbytes = sum(array.nbytes for array in to_arrays(rows).values())
    # A disk that is nearly full is left to what the run itself writes.
    if nbytes > min(MAX_BYTES, free_bytes(entry) // 2):
        tell(f"the prepared rows are not kept: they take {nbytes:,} bytes, too many for {entry.parent}")
        return
    try:
        write_entry(entry, rows)
    except OSError as error:
        tell(f"the prepared rows are not kept: {storage_error(entry.parent, error, nbytes)}")
    with suppress(OSError):  # others may be at it too
        drop_oldest(entry.parent, MAX_BYTES)


def write_entry(entry: Path, rows: TokenizedRows) -> None:
    """Writes an entry, whole or not at all. Raises `OSError` where it cannot be written."""
    assert rows.origins is not None
    with temporary_folder(entry.parent, _NEW) as folder:
        for name, array in to_arrays(rows).items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        about = {"name": entry.name, "sources": list(rows.origins.names), "stats": rows.stats.to_dict()}
        (folder / _STATS).write_text(json.dumps(about), encoding="ascii")
        write_manifest(folder)
        try:
            folder.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
            # Another run has written the same meanwhile.


def read_entry(entry: Path, *, vocabulary: int = 2**31) -> TokenizedRows:
    """Opens an entry as memory maps, once its files are what was written.

    Args:
        entry: The folder.
        vocabulary: What every id is below.

    Raises:
        Damaged: For files that are not what was written.
        InputError: For files that cannot be read.
        ValueError: For content that is none of prepared rows.
    """
    files = {name: entry / f"{name}.npy" for name in TYPES}
    for file in (*files.values(), entry / _STATS):
        check_file(file)
    check(entry, thoroughly=True)
    about = read_json(entry / _STATS)
    sources = about.get("sources")
    if about.get("name") != entry.name or not isinstance(sources, list) or set(map(type, sources)) - {str}:
        raise ValueError("it is another's")
    # Plain arrays over the maps: slices of them are made faster.
    arrays = {name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for name, file in files.items()}
    return from_arrays(arrays, DataStats.from_dict(about.get("stats")), sources, vocabulary=vocabulary)


def drop_oldest(folder: Path, limit: int) -> None:
    """Takes entries away until all that are left take no more than `limit` bytes; those last used stay."""
    for rest in folder.glob(f"{_OLD}*"):  # of a run that was killed at it
        shutil.rmtree(rest, ignore_errors=True)
    entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(_NEW)]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if sum(sizes.values()) <= limit:
            return
        _take_away(entry)
        del sizes[entry]


def _take_away(entry: Path) -> None:
    """Removes an entry, at once for those who look for it. What runs have open stays theirs until they end."""
    aside = entry.with_name(f"{_OLD}{uuid.uuid4().hex}")
    try:
        entry.rename(aside)
    except OSError:
        return  # gone already, or not ours
    shutil.rmtree(aside, ignore_errors=True)
