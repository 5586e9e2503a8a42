"""JSON and YAML from files that anybody may have written: bounded in size and depth, nothing in them twice.

Whatever is wrong is an `InputError` that names the file. Links are followed within a folder alone, and from
the hub's cache to where that keeps its files: a folder from a stranger cannot have others read, or copied.
"""

import json
import math
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from phi3_jax.system.errors import InputError

MAX_JSON = 64 * 2**20  # bytes; a checkpoint's index has less than 1 MiB
MAX_YAML = 2**18
MAX_DEPTH = 50
MAX_NODES = 20_000  # of YAML, aliases written out
_MAX_DIGITS = 40  # tokenizers say 10^30 where they mean any length
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")


def read_json(path: Path, advice: str = "download it again") -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        advice: What to do about a broken file, for the message.

    Raises:
        InputError: As `read_text` does, and for what is no JSON object, is nested more than 50 deep, has a name twice,
            a number that is not finite or a whole number of more than 40 digits.
    """
    text = read_text(path, advice)
    try:
        raw = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); {advice}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected a JSON object; {advice}")
    return raw


def read_yaml(path: Path, advice: str = "mend it there") -> Any:
    """What a YAML file holds, of any type. Raises `InputError` as `read_text`, and where `parse_yaml` refuses."""
    text = read_text(path, advice, limit=MAX_YAML)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{path}: is not YAML ({error}); {advice}") from error


def read_text(path: Path, advice: str = "download it again", *, limit: int = MAX_JSON) -> str:
    """The text of a file.

    Raises:
        InputError: For what is no file, cannot be read, is larger than `limit` bytes, leads out of its folder or is not
            UTF-8.
    """
    check_file(path, advice)
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: is larger than {limit / 2**20:g} MiB, which no such file is; {advice}")
        with path.open("rb") as file:
            return file.read(size).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); {advice}") from error


def local_path(name: str | Path, what: str = "") -> Path:
    """The path that a name means here, `~` written out.

    Args:
        name: A path, as somebody wrote it.
        what: Is named so, for the message.

    Raises:
        InputError: For a name that no path can have, and for folders that may not be looked into.
    """
    if name == "":  # which Path takes for the folder that this is run in; a shell's variable that is not set
        raise InputError(f"{what or 'a path'} is empty, expected one; give . for this folder")
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{what}{' ' * bool(what)}{str(name)[:300]}: is not a path that can be read ({reason}); check it"
        ) from error
    return path


def check_file(path: Path, advice: str = "download it again") -> None:
    """Raises `InputError` for what is no regular file, and as `check_inside`.

    Such are not opened at all: a pipe would wait for a writer, and a device may never end.
    """
    check_inside(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: is no regular file; {advice}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error


def check_inside(path: Path) -> None:
    """Raises `InputError` for a link that leads out of the folder it is in, unless that is of the hub's cache."""
    try:
        if not path.is_symlink():
            return
        target, folder = path.resolve(), path.parent.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, before Python 3.13 a RuntimeError
        raise InputError(f"{path}: is a link that leads nowhere; put the file itself there") from error
    if not target.is_relative_to(folder) and not _is_cached(target, folder):
        raise InputError(f"{path}: is a link to {target}, out of its folder; put the file itself there")


def _is_cached(target: Path, folder: Path) -> bool:
    """Whether the hub's cache, that `folder` is a snapshot of, keeps its files at `target`."""
    repository = next((part for part in folder.parents if _REPOSITORY.fullmatch(part.name)), None)
    if repository is None or folder.relative_to(repository).parts[0] != "snapshots":
        return False
    # Newer hubs have a store for all repositories beside them.
    return any(target.is_relative_to(place) for place in (repository / "blobs", repository.parent / "blobs"))


def unique_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """`object_pairs_hook` for json: a name that stands twice is an error, not the last one's win."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:100]!r} stands twice")
    return result


def parse_json(text: str | bytes) -> Any:
    """JSON within the bounds of `read_json`, which may be of any type. Raises `ValueError`."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            entry
            for outer in level
            if isinstance(outer, dict | list)
            for entry in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("nested too deep")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}... is too large")
    return int(text)


class _Loader(yaml.SafeLoader):
    """Stops at the first bracket that is too deep; looking further takes time with the square of the depth."""

    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise ValueError("nested too deep")
        super().fetch_flow_collection_start(kind)


def parse_yaml(text: str) -> object:
    """The value of YAML text, `yaml.safe_load`'s, within bounds.

    Raises:
        ValueError: For what is no YAML, is nested more than 50 deep, has a key twice, a whole number of more than 40
            digits, or more than 20,000 nodes once aliases are written out.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    # What is wrong with a tagged or typed scalar comes as whatever the constructor met.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
        raise ValueError(said or type(error).__name__) from error


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """How many nodes, and how many levels of them, with aliases written out; numbers in base 60 become text.

    Args:
        node: Of the YAML text.
        known: The same of nodes that were measured, by their id; `(0, 0)` while they are.
        depth: How many levels `node` lies below the whole.
    """
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise ValueError("an alias stands within what it names")
        return known[id(node)]
    known[id(node)] = 0, 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MAX_DIGITS:
        raise ValueError(f"the number {node.value[:40]}... is too large")
    elif node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in node.value:
        # To YAML 1.1 10:13 is 613, in base 60; to YAML 1.2, and to who writes it, it is text.
        node.tag = "tag:yaml.org,2002:str"
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    measured = [_measure(part, known, depth + 1) for part in parts]
    count, levels = 1 + sum(size for size, _ in measured), 1 + max((height for _, height in measured), default=0)
    if levels > MAX_DEPTH:
        raise ValueError("nested too deep")
    if count > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} entries, aliases written out")
    known[id(node)] = count, levels
    return count, levels


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise ValueError(f"the key {key.value[:100]!r} stands twice, line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))
