"""Feeds damaged files to the readers: each is read, or refused in one line, in little time and memory.

    python scripts/fuzz.py --cases 10000

A case takes valid files and damages one of them: bytes, cuts, repeats, values of other types, numbers that are
too large, hostile names, links and pipes in a file's place. Then it is read as the commands do. It fails by any
other exception than `InputError`, an error of several lines or with control characters, more than --seconds, or
more than --megabytes of Python's and numpy's memory. A case's number makes it again: --readers NAME --first N
--cases 1 --keep FOLDER leaves its files there. The exit status is 1 where a case failed.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from fuzz_readers import READERS, Reader, as_json

from phi3_jax.system.errors import InputError
from phi3_jax.system.text import INVISIBLE

# Damage.

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -1e308, 1e-320, float("nan"), float("inf")),
    *("", "x", "x" * 5000, "\x1b[31mred", "\u202eabc", "\ud800", "\0", "../../x", "/etc/passwd", "(a+)+$", "[", "~x/y"),
    *([], {}, [[[]]], [None], ["a", 1], {"": None}, {"a": [1]}, list(range(3000)), "os.system", "2024-13-45"),
)
TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"-", b"\\ud800"),
    *(b"9" * 400, b"1e999", b"NaN", b"\x1b[2J", b"[" * 2000, b"{" * 2000, b"&a [*a]", b"2024-13-45", b"!!int x"),
    *(b"!!python/object/apply:os.system [exit]", b"'", b"\t", b"? ", b"- ", b"<<: ", b"\xe2\x80\xae", b"\xc2\x85"),
)


def damage(file: Path, draw: random.Random) -> None:
    """Damages a file: what it is, the values in it where its format is known, or its bytes."""
    if draw.random() < 0.02:
        _replace(file, draw)
    elif file.suffix in CHANGES and draw.random() < 0.6:
        CHANGES[file.suffix](file, draw)
    else:
        content = file.read_bytes()
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            content = _damaged(content, draw)
        file.write_bytes(content)


def _replace(file: Path, draw: random.Random) -> None:
    file.unlink()
    kind = draw.choice(("nothing", "folder", "pipe", "link", "device", "circle"))
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "nothing":
        file.symlink_to({"link": "/etc/passwd", "device": "/dev/zero", "circle": file.name}[kind])


def _damaged(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 2, 8, 64, 1000)))
    before, part, after = content[:start], content[start:end], content[end:]
    kind = draw.randrange(7)
    if kind == 0:
        return before
    if kind == 1:
        return before + after
    if kind == 2:
        return before + part * draw.choice((2, 3, 50)) + after
    if kind == 3:
        return before + draw.choice(TOKENS) + part + after
    if kind == 4:
        return before + draw.choice(TOKENS) + after
    if kind == 5:
        return before + draw.randbytes(len(part)) + after
    return before + bytes(byte ^ (1 << draw.randrange(8)) for byte in part[:1]) + part[1:] + after


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with something in it changed: replaced, taken out, renamed or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        rest = {name: part for name, part in value.items() if name != key}
        if kind < 0.1:
            return rest
        if kind < 0.2:
            return {**rest, draw.choice(("", "x", "\x1b]0;x\x07", "\u202ex", f"{key}.x", "__proto__")): value[key]}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        index = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.15:
            return value[:index] + value[index + 1 :]
        if kind < 0.3:
            return [*value, value[index]]
        return [*value[:index], _changed(value[index], draw), *value[index + 1 :]]
    kind = draw.random()
    if kind < 0.1:
        return [value]
    if kind < 0.2:
        return {"x": value}
    if kind < 0.25:
        for _ in range(draw.choice((10, 60, 400))):
            value = [value]
        return value
    if kind < 0.35 and isinstance(value, int | float):
        return value + draw.choice((-1, 1, 0.5, 2**40))
    return draw.choice(VALUES)


def _change_json(file: Path, draw: random.Random) -> None:
    file.write_bytes(as_json(_changed(json.loads(file.read_bytes()), draw)))


def _change_lines(file: Path, draw: random.Random) -> None:
    lines = file.read_bytes().splitlines()
    index = draw.randrange(len(lines))
    lines[index] = as_json(_changed(json.loads(lines[index]), draw))
    file.write_bytes(b"\n".join(lines))


def _change_header(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = as_json(_changed(json.loads(content[8:end]), draw))
    length = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1))
    file.write_bytes(length.to_bytes(8, "little") + header + content[end:])


def _change_yaml(file: Path, draw: random.Random) -> None:
    file.write_bytes(as_json(_changed(yaml.safe_load(file.read_bytes()), draw)))  # which is YAML as well


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    ".json": _change_json,
    ".jsonl": _change_lines,
    ".safetensors": _change_header,
    ".yaml": _change_yaml,
}

# Running them.


@dataclass
class Summary:
    """Attributes:
    outcomes: Of each reader.
    slowest: In seconds, and `largest`, in bytes.
    failures: Told.
    """

    outcomes: dict[str, collections.Counter[str]] = field(default_factory=dict)
    slowest: float = 0.0
    largest: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{name:<10} {counts.total():>6,} cases: {counts['read']:>6,} read, {counts['refused']:>6,} refused, "
            f"{counts['failed']} failed"
            for name, counts in self.outcomes.items()
        ]
        total = sum(counts.total() for counts in self.outcomes.values())
        return "\n".join(
            [
                *self.failures,
                *lines,
                f"{total:,} cases, {len(self.failures)} failures; slowest {self.slowest:.2f} s, most memory "
                f"{self.largest / 2**20:.1f} MiB",
            ]
        )


class TookTooLong(BaseException):
    """No `Exception`, so that nobody takes it for a damaged file."""


def fuzz(name: str, cases: Iterable[int], folder: Path, *, seconds: float = 10.0, megabytes: float = 256.0) -> Summary:
    """Runs a reader on cases, each made by its number alone. Failing ones stay in `folder`."""
    reader, summary = READERS[name], Summary()
    counts = summary.outcomes[name] = collections.Counter()
    reader.write(folder / "whole")
    reader.read(folder / "whole")  # else nothing would be tested; and what is imported once is there
    for case in cases:
        draw = random.Random(f"{name} {case}")
        damaged = folder / f"{name}-{case}"
        shutil.rmtree(damaged, ignore_errors=True)  # of an earlier call
        shutil.copytree(folder / "whole", damaged)
        damage(draw.choice(sorted(file for file in damaged.rglob("*") if file.is_file())), draw)
        outcome, taken, peak = _try(reader, damaged, seconds)
        summary.slowest, summary.largest = max(summary.slowest, taken), max(summary.largest, peak)
        if outcome in ("read", "refused") and peak > megabytes * 2**20:
            outcome = f"took {peak / 2**20:.0f} MiB"
        if outcome in ("read", "refused"):
            counts[outcome] += 1
            shutil.rmtree(damaged)
        else:
            counts["failed"] += 1
            summary.failures.append(f"{name} case {case}: {outcome}")
    return summary


def _try(reader: Reader, folder: Path, seconds: float) -> tuple[str, float, int]:
    """What came of reading, the seconds it took, and the most bytes."""

    def stop(*_: Any) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, stop)
    started = time.perf_counter()
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        reader.read(folder)
        outcome = "read"
    except InputError as error:
        told = str(error)
        outcome = "refused"
        if INVISIBLE.search(told) or "\n" in told:
            outcome = f"an error with control characters or several lines: {told!r}"
    except KeyboardInterrupt:
        raise
    except TookTooLong:
        outcome = f"took more than {seconds:g} s"
    except BaseException as error:  # also the panics of Rust libraries
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return outcome, time.perf_counter() - started, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all readers together (default: 10,000)")
    parser.add_argument("--first", type=int, default=0, help="number of a reader's first case (default: 0)")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=10.0, help="a case may take (default: 10)")
    parser.add_argument("--megabytes", type=float, default=256.0, help="a case may take (default: 256)")
    parser.add_argument("--keep", type=Path, help="folder for the files of failing cases")
    arguments = parser.parse_args()
    everything, each = Summary(), -(-arguments.cases // len(arguments.readers))
    for name in arguments.readers:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
            folder = arguments.keep / name if arguments.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            cases = range(arguments.first, arguments.first + each)
            found = fuzz(name, cases, folder, seconds=arguments.seconds, megabytes=arguments.megabytes)
        everything.outcomes |= found.outcomes
        everything.failures += found.failures
        everything.slowest = max(everything.slowest, found.slowest)
        everything.largest = max(everything.largest, found.largest)
    print(everything)
    return 1 if everything.failures else 0


if __name__ == "__main__":
    sys.exit(main())
