"""What devices send one another in a layer, read from a compiled step's HLO text."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(")
_OPERATION = re.compile(rf"= (\(?.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+\d+)\[[\d,]+\]")
_PLACE = re.compile(r'op_name="([^"]*)"')
_LINE = re.compile(r"(stack_frame_id=\d+|source_line=\d+)")
# All pieces into which one is cut, to overlap with several other operations, have its number.
_CHAIN = re.compile(r'(chain_id="\d+")')
_CALLS = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
# The scans over layers carry the name of the function that holds them.
_LAYERS = re.compile(r' while\(.*op_name="[^"]*?(transpose\()?jvp\(jit\(_forward\)\)\)?/while"')


@dataclass(frozen=True)
class Collective:
    """What devices send one another at one place of a program.

    Attributes:
        kind: One of `KINDS`.
        arrays: What it gives on each device, as `bf16[1,9216,3072]`.
        operation: What of the program it belongs to.
    """

    kind: str
    arrays: tuple[str, ...]
    operation: str


def layer_collectives(hlo: str) -> dict[str, list[Collective]]:
    """The collectives in one layer of the `forward` and of the `backward` pass, recomputation in the latter.

    One that the compiler has cut into a start, steps and an end counts once; so does one that it makes
    of several permutations, overlapped with the product that they belong to.

    Args:
        hlo: `as_text()` of a compiled step (`training.step.make_train_step`).
    """
    computations = dict(_computations(hlo))
    loops: dict[str, list[Collective]] = {"forward": [], "backward": []}
    for lines in computations.values():
        for line in lines:
            if found := _LAYERS.search(line):
                body = re.search(r"body=%([\w.\-]+)", line)
                assert body is not None
                loops["backward" if found[1] else "forward"] += _collectives(_reachable(computations, body[1]))
    return loops


def count_collectives(collectives: list[Collective]) -> dict[str, int]:
    """How many there are of each kind, with what each gives: `all-gather bf16[1,9216,3072]` -> 1."""
    return dict(Counter(f"{c.kind} {', '.join(c.arrays)}" for c in collectives))


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name: str = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name, lines = found[1], []
        elif re.match(r"}(?!})", line):  # two of them end an attribute
            yield name, lines
        else:
            lines.append(line)


def _reachable(computations: dict[str, list[str]], start: str) -> Iterator[str]:
    """The lines of a computation and of all that it calls."""
    seen, waiting = {start}, [start]
    while waiting:
        for line in computations[waiting.pop()]:
            yield line
            for names in _CALLS.findall(line):
                new = set(re.findall(r"%([\w.\-]+)", names)) - seen
                seen |= new
                waiting += new


def _collectives(lines: Iterator[str]) -> list[Collective]:
    found: dict[str, Collective] = {}
    for line in lines:
        operation = _OPERATION.search(line)
        if operation is None:
            continue
        kind, arrays = operation[2], _ARRAY.findall(operation[1])
        if operation[3]:  # what begins it and does not end it has its inputs beside its results
            arrays = arrays[len(arrays) // 2 :]
        place = _search(_PLACE, line)
        key = _search(_CHAIN, line) or line
        if kind == "collective-permute":
            # A sum or a gather that is overlapped with its product is a ring of permutations.
            key = f"{place} {arrays} {_search(_LINE, line)}"
        found.setdefault(key, Collective(kind, tuple(arrays), place))
    return list(found.values())


def _search(pattern: re.Pattern[str], line: str) -> str:
    match = pattern.search(line)
    return match[1] if match else ""
