"""A compiled program as XLA writes it down: its instructions, how often each runs, and what each moves and multiplies.

The texts are those of `jax.stages.Compiled.as_text()`. Their form is XLA's own and no interface; what is read of
it is tried against cut-down texts in the tests, and against the installed compilers by the slow ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

# Instructions that neither move nor compute anything.
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    )
) | {"domain", "opt-barrier"}

# Names of the same array, or parts of it, by which nothing is read.
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1.0),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2.0),
    **dict.fromkeys(("f32", "s32", "u32"), 4.0),
    **dict.fromkeys(("f64", "s64", "u64"), 8.0),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_MENTIONED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_OUTSIDE = re.compile(r"S\([1-9]\)")  # a layout in a memory nearer to the processor than the device's


@dataclass(frozen=True)
class Array:
    """An array as an instruction gives or takes it.

    Attributes:
        dtype: XLA's name of its type.
        shape: Its axes.
        layout: What XLA says of its place: the order of axes, tiles, memory.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def is_in_device_memory(self) -> bool:
        """Whether it lies in the device's large memory, and not in one that is part of the processor."""
        return not _OUTSIDE.search(self.layout)

    @cached_property
    def size(self) -> float:
        """Bytes, with what fills up its tiles."""
        return math.prod(self._padded) * _BYTES[self.dtype]

    @property
    def _padded(self) -> list[int]:
        axes = list(self.shape)
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",") if axis.strip().isdigit()]
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if tile and len(order) == len(axes):
            for axis, size in zip(order, reversed([int(size) for size in tile[1].split(",")]), strict=False):
                axes[axis] = math.ceil(axes[axis] / size) * size
        return axes


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Its name in its computation.
        opcode: What it does.
        shape: The text of what it gives.
        operands: The names of what it takes.
        text: The whole line.
        is_root: Whether its computation gives what it gives.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it gives."""
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, with the named scopes there."""
        return self._of(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """Of a custom call what is called."""
        return self._of(r'custom_call_target="([^"]*)"')

    @property
    def called(self) -> str:
        """Of a fusion or call its computation."""
        found = _CALLED.search(self.text)
        return found[1] if found else ""

    @property
    def body(self) -> str:
        """Of a loop what it runs."""
        return self._of(r"body=%?([\w.\-]+)")

    @property
    def cycles(self) -> int | None:
        """XLA's own estimate, which TPUs' programs have; None where it gives none."""
        found = self._of(r'"estimated_cycles":"(\d+)"')
        return int(found) if found else None

    def _of(self, pattern: str) -> str:
        found = re.search(pattern, self.text)
        return found[1] if found else ""


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in the text of a shape.

    Example:
        >>> [(a.dtype, a.shape, a.size) for a in arrays("(f32[2,3], bf16[8]{0:T(128)})")]
        [('f32', (2, 3), 24.0), ('bf16', (8,), 256.0)]
    """
    return tuple(
        Array(dtype, tuple(int(size) for size in axes.split(",") if size), layout)
        for dtype, axes, layout in _ARRAY.findall(shape)
        if dtype in _BYTES
    )


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: The instructions of each of its parts, by name.
        entry: The name of the part that runs first.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def of(cls, text: str) -> Program:
        """Reads what `Compiled.as_text()` gives.

        Example:
            >>> program = Program.of("ENTRY %main (x: f32[2]) -> f32[2] {\\n  ROOT %x = f32[2] parameter(0)\\n}")
            >>> program.entry, program.computations["main"][0].opcode
            ('main', 'parameter')
        """
        parts: dict[str, list[Instruction]] = {}
        entry = name = ""
        for line in text.splitlines():
            if not name:
                if found := _COMPUTATION.match(line):
                    name = found[2]
                    parts[name] = []
                    entry = name if found[1] else entry
            elif re.match(r"}(?!})", line):  # two of them end an attribute
                name = ""
            elif (found := _INSTRUCTION.match(line)) and (instruction := _read(found[1], found[2], found[3], line)):
                parts[name].append(instruction)
        return cls({name: tuple(instructions) for name, instructions in parts.items()}, entry)

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that does something: its computation, itself, and how often it runs in one call.

        What a fusion holds belongs to the fusion. Of branches the longest counts.
        """
        return self._runs(self.entry, 1)

    def reachable(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation and of all that it calls, each once."""
        seen, waiting = {computation}, [computation]
        while waiting:
            for instruction in self.computations[waiting.pop()]:
                yield instruction
                for names in _MENTIONED.findall(instruction.text):
                    new = set(re.findall(r"%([\w.\-]+)", names)) & self.computations.keys() - seen
                    seen |= new
                    waiting += new

    def flops(self, computation: str, instruction: Instruction) -> float:
        """FLOP of the matrix products in an instruction, once."""
        if instruction.opcode in ("dot", "convolution"):
            return _product_flops(instruction, self._shapes[computation])
        if instruction.opcode in ("fusion", "call"):
            called = instruction.called
            return sum(self.flops(called, inner) for inner in self.computations.get(called, ()))
        return 0.0

    def products(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """The matrix products in an instruction, each with its computation."""
        if instruction.opcode in ("dot", "convolution"):
            yield computation, instruction
        elif instruction.opcode in ("fusion", "call"):
            for inner in self.computations.get(instruction.called, ()):
                yield from self.products(instruction.called, inner)

    def bytes_moved(self, computation: str, instruction: Instruction) -> float:
        """Bytes that an instruction reads from and writes to the device's memory, once."""
        shapes = self._shapes[computation]
        if instruction.opcode.endswith(("-done", "-update")):
            return 0.0
        # What begins something gives its inputs again beside the result, which comes first.
        given = _in_memory(instruction.shape) if not instruction.opcode.endswith("-start") else _first(instruction)
        if instruction.opcode == "fusion" and instruction.called in self.computations:
            return self._fusion_bytes(instruction)
        if instruction.opcode == "dynamic-slice":
            return 2 * given
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _in_memory(shapes.get(instruction.operands[1], ""))
        return given + sum(_in_memory(shapes.get(name, "")) for name in instruction.operands)

    def shapes_of(self, computation: str) -> Mapping[str, str]:
        """The text of what each instruction of a computation gives, by its name."""
        return self._shapes[computation]

    @cached_property
    def _shapes(self) -> dict[str, dict[str, str]]:
        return {name: {one.name: one.shape for one in part} for name, part in self.computations.items()}

    def _runs(self, computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[computation]:
            if instruction.opcode == "while":
                yield from self._runs(instruction.body, times * self.trips(instruction))
            elif instruction.opcode == "conditional":
                yield from self._longest(instruction, times)
            elif instruction.opcode == "call" and instruction.called in self.computations:
                yield from self._runs(instruction.called, times)
            elif instruction.opcode not in _FREE:
                yield computation, instruction, times

    def _longest(self, instruction: Instruction, times: int) -> list[tuple[str, Instruction, int]]:
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
        names = re.findall(r"%?([\w.\-]+)", found[1]) if found else []
        names = names or re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.text)
        branches = [list(self._runs(name, times)) for name in names]
        return max(branches, key=lambda runs: sum((one.cycles or 0) * n for _, one, n in runs), default=[])

    def trips(self, loop: Instruction) -> int:
        """How often a loop goes round: what XLA knows, or else the largest constant of its condition."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        inside = list(self.computations.get(condition[1], ())) if condition else []
        inside += [one for outer in inside for one in self.computations.get(outer.called, ())]
        numbers = [re.search(r" constant\((\d+)\)", one.text) for one in inside if one.opcode == "constant"]
        return max((int(number[1]) for number in numbers if number), default=1)

    def _fusion_bytes(self, fusion: Instruction) -> float:
        """Bytes of a fusion: of arrays of which it takes slices alone, the slices."""
        read = sum(self._read_bytes(fusion.called, place) for place in range(len(fusion.operands)))
        return read + _written_bytes(fusion, self.computations[fusion.called])

    def _read_bytes(self, computation: str, place: int) -> float:
        """What a fusion's computation reads of the operand at this place."""
        users = self._users[computation]
        parameter = next((one for one in self.computations[computation] if _is_parameter(one, place)), None)
        if parameter is None:
            return 0.0
        size, parts = _in_memory(parameter.shape), 0.0
        for user, name in _uses(parameter.name, users):
            if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and user.operands[0] == name):
                parts += sum(array.size for array in user.arrays)
            elif user.opcode == "fusion" and user.called in self.computations:  # fusions hold fusions
                parts += self._read_bytes(user.called, user.operands.index(name))
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):  # the rest stays as it is
                return size
        return min(size, parts)

    @cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        """What takes each array, by computation and the array's name."""
        found: dict[str, dict[str, list[Instruction]]] = {}
        for computation, part in self.computations.items():
            users = found.setdefault(computation, {})
            for instruction in part:
                for name in instruction.operands:
                    users.setdefault(name, []).append(instruction)
        return found


def _read(root: str | None, name: str, rest: str, line: str) -> Instruction | None:
    shape, rest = _split_shape(rest)
    opcode = re.match(r"([\w\-]+)\(", rest)
    if opcode is None:
        return None
    inner = rest[len(opcode[0]) - 1 : _closing(rest, len(opcode[0]) - 1)]
    return Instruction(name, opcode[1], shape, tuple(re.findall(r"%([\w.\-]+)", inner)), line, bool(root))


def _split_shape(text: str) -> tuple[str, str]:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _in_memory(shape: str) -> float:
    return sum(array.size for array in arrays(shape) if array.is_in_device_memory)


def _first(instruction: Instruction) -> float:
    return sum(array.size for array in instruction.arrays[:1] if array.is_in_device_memory)


def _is_parameter(instruction: Instruction, place: int) -> bool:
    return instruction.opcode == "parameter" and f" parameter({place})" in instruction.text


def _uses(name: str, users: Mapping[str, list[Instruction]]) -> Iterator[tuple[Instruction, str]]:
    """What uses an array, by this name or another, and the name."""
    for user in users.get(name, ()):
        if user.opcode in _VIEWS:
            yield from _uses(user.name, users)
        else:
            yield user, name


def _written_bytes(fusion: Instruction, body: tuple[Instruction, ...]) -> float:
    by_name = {inner.name: inner for inner in body}
    root = next(inner for inner in body if inner.is_root)
    outputs = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for output, array in zip(outputs, fusion.arrays, strict=False):
        while output.opcode in _VIEWS and output.operands:
            output = by_name[output.operands[0]]
        if output.opcode == "dynamic-update-slice":
            total += sum(part.size for part in by_name[output.operands[1]].arrays)
        elif array.is_in_device_memory:
            total += array.size
    return total


def product_axes(instruction: Instruction, shapes: Mapping[str, str]) -> tuple[tuple[int, ...], int]:
    """Of a matrix product the shape of what it gives, and how many numbers it sums for each."""
    given = instruction.arrays[0].shape
    if instruction.opcode == "dot":
        left = arrays(shapes[instruction.operands[0]])[0].shape
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        return given, math.prod(left[int(axis)] for axis in summed[1].split(",") if axis) if summed else 1
    right = arrays(shapes[instruction.operands[1]])[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        return given, 1
    return given, math.prod(size for axis, size in zip(labels[2], right, strict=True) if axis == "i" or axis.isdigit())


def _product_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    given, summed = product_axes(instruction, shapes)
    flops = 2.0 * math.prod(given) * summed
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    sizes = re.search(r"size=([\dx]+)", window[1]) if window else None
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if not (window and sizes and labels and re.search(r"pad=|lhs_dilate", window[1])):
        return flops
    # A batched product is written as a window as large as the batch, of which one place counts.
    batch = [size for axis, size in zip(labels[3], given, strict=True) if axis.isdigit()]
    for size, rows in zip((int(size) for size in sizes[1].split("x")), batch, strict=False):
        if size > 1 and size == rows:
            flops /= size
    return flops
