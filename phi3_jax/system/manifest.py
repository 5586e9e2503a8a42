"""What a folder that is kept consists of, file by file, so that damage shows before anything is read."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

import xxhash

from phi3_jax.system.files import sync

NAME = "manifest.json"
SMALL = 1 << 20  # bytes; files up to this size are read even where only sizes are compared
CHUNK = 1 << 22


class Manifest(TypedDict):
    """What stands in the file, beside its own digest.

    Attributes:
        files: bytes and hash of each, by its path within the checkpoint.
        score: of the evaluation at this checkpoint, the lower the better, if it is one and there was one.
    """

    files: dict[str, tuple[int, str]]
    score: float | None


class Damaged(Exception):
    """A folder that is not what was written; the message says where."""


def write_manifest(folder: Path, score: float | None = None) -> None:
    """Writes down the size and the hash of every file, once all are there.

    The files are on the disk when this returns, and so is the list.

    Args:
        folder: a checkpoint's, or another one.
        score: of the evaluation at this checkpoint, the lower the better, if it is one and there was one.
    """
    files = {str(path.relative_to(folder)): _seal(path) for path in sorted(_files(folder))}
    _write(folder, {"files": files, "score": score})


def change_score(folder: Path, score: float | None) -> None:
    """Writes another `score` down, and leaves the rest as it is."""
    _write(folder, {**_read(folder), "score": score})


def check(folder: Path, *, thoroughly: bool) -> float | None:
    """Compares the files with the manifest.

    Args:
        folder: a checkpoint's, or another one.
        thoroughly: that every file's hash is compared, not just its size and small files' hashes.

    Returns:
        Its `score`.

    Raises:
        Damaged: where they differ.
        OSError: where a file cannot be read for another reason.
    """
    manifest = _read(folder)
    for name, (size, digest) in manifest["files"].items():
        _check_file(folder / name, name, size, digest, thoroughly=thoroughly)
    return manifest["score"]


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compares some of the files with the manifest, to their last byte; another file than those it lists passes.

    Raises:
        Damaged: where they differ, and where the manifest is none.
        OSError: where a file cannot be read for another reason.
    """
    listed = _read(folder)["files"]
    for name in names:
        if name in listed:
            _check_file(folder / name, name, *listed[name], thoroughly=True)


def _check_file(path: Path, name: str, size: int, digest: str, *, thoroughly: bool) -> None:
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{name} is missing") from error
    if found != size:
        raise Damaged(f"{name} has {found:,} bytes instead of {size:,}")
    if (thoroughly or size <= SMALL) and _hash(path) != digest:
        raise Damaged(f"{name} is not what was written")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _seal(path: Path) -> tuple[int, str]:
    sync(path)
    return path.stat().st_size, _hash(path)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _own_digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _write(folder: Path, manifest: Manifest) -> None:
    beside = folder / f"{NAME}.tmp"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({**manifest, "digest": _own_digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / NAME)


def _read(folder: Path) -> Manifest:
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        digest = manifest.pop("digest")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{NAME} is missing") from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Damaged(f"{NAME} is not what was written") from error
    if digest != _own_digest(manifest):
        raise Damaged(f"{NAME} is not what was written")
    # It was the evaluation's loss, and was called so, before there were others.
    return {"files": manifest["files"], "score": manifest.get("score", manifest.get("eval_loss"))}
