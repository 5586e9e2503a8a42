"""What devices send one another in a layer, read from a compiled step's HLO text."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from phi3_jax.performance.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_LINE = re.compile(r"(stack_frame_id=\d+|source_line=\d+)")
# All pieces into which one is cut, to overlap with several other operations, have its number.
_CHAIN = re.compile(r'(chain_id="\d+")')
# The scans over layers carry the name of the function that holds them.
_LAYERS = re.compile(r"(transpose\()?jvp\(jit\(_forward\)\)\)?/while$")


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
    program = Program.of(hlo)
    loops: dict[str, list[Collective]] = {"forward": [], "backward": []}
    for part in program.computations.values():
        for instruction in part:
            found = _LAYERS.search(instruction.op_name) if instruction.opcode == "while" else None
            if found:
                loops["backward" if found[1] else "forward"] += _collectives(program.reachable(instruction.body))
    return loops


def count_collectives(collectives: list[Collective]) -> dict[str, int]:
    """How many there are of each kind, with what each gives: `all-gather bf16[1,9216,3072]` -> 1."""
    return dict(Counter(f"{c.kind} {', '.join(c.arrays)}" for c in collectives))


def _collectives(instructions: Iterable[Instruction]) -> list[Collective]:
    found: dict[str, Collective] = {}
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays = [f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in instruction.arrays if array.shape]
        if kind != instruction.opcode:  # what begins it and does not end it has its inputs beside its results
            arrays = arrays[len(arrays) // 2 :]
        key = _search(_CHAIN, instruction.text) or instruction.text
        if kind == "collective-permute":
            # A sum or a gather that is overlapped with its product is a ring of permutations.
            key = f"{instruction.op_name} {arrays} {_search(_LINE, instruction.text)}"
        found.setdefault(key, Collective(kind, tuple(arrays), instruction.op_name))
    return list(found.values())


def _search(pattern: re.Pattern[str], line: str) -> str:
    match = pattern.search(line)
    return match[1] if match else ""
