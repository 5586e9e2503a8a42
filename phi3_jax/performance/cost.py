"""What a compiled step costs by kind of work: time as XLA estimates it, bytes, products, and what devices wait for.

The time of an instruction is XLA's own estimate, `estimated_cycles`, which the compiler for TPUs writes beside each
and uses to order them. It is no measurement; two programs for one device compare well by it. It has none for
kernels written in Pallas, whose time is reckoned from their products here, and none for what devices send one
another, which is reckoned from bytes where the program waits for it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from phi3_jax.parallel.hardware import Hardware
from phi3_jax.performance.hlo import Instruction, Program, arrays
from phi3_jax.system.parts import part_of

# Parts of the step (`system.parts`) whose work is of a kind of its own, products and kernels too.
_OF_PARTS = {
    "loss": "loss",
    "dequantise": "dequantising",
    "dropout": "dropout",
    "attend": "attention",
    "rope": "RoPE and layout",
    "optimizer": "optimizer",
}
# What programs without names for their parts show of them.
_TRACES = {
    "loss": r"jit\(_sums\)",
    "dequantising": r"_dequantize",
    "dropout": r"threefry|bernoulli|random_bits",
    "attention": r"splash",
}
BASE, ADAPTERS, ATTENTION, LAYOUT = "base products", "adapters", "attention", "RoPE and layout"
KINDS = (BASE, ADAPTERS, ATTENTION, LAYOUT, "dropout", "dequantising", "loss", "optimizer", "collectives", "others")

# A product with FLOP for each number of its largest array below this is one with a thin matrix of an adapter.
_THIN = 1024

_SENDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Work:
    """What a kind of work takes in one step, on one device.

    Attributes:
        seconds: By XLA's estimate.
        bound: Seconds that it takes at least: of each instruction the longer of its products at the peak and of its
            bytes at the memory's bandwidth.
        flops: Of matrix products.
        bytes: Read from and written to the device's memory.
        runs: How many instructions are run.
    """

    seconds: float = 0.0
    bound: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    runs: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StepCost:
    """What a compiled step costs, on one device.

    Attributes:
        work: By kind.
        sent: How often devices send one another something, by kind of collective.
        waited_for: The same for those during which nothing else runs.
        waited_bytes: What the latter give, in bytes.
        kernel_flops: Of kernels but attention's, of which XLA knows no time: products in them, by the kernel's name.
    """

    work: Mapping[str, Work]
    sent: Mapping[str, int] = field(default_factory=dict)
    waited_for: Mapping[str, int] = field(default_factory=dict)
    waited_bytes: float = 0.0
    kernel_flops: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> StepCost:
        """That of which `dataclasses.asdict` made `raw`."""
        return cls(**{**raw, "work": {kind: Work(**figures) for kind, figures in raw["work"].items()}})

    @property
    def seconds(self) -> float:
        """By XLA's estimate, which leaves out kernels and what devices send."""
        return sum(work.seconds for work in self.work.values())

    @property
    def bound(self) -> float:
        """Seconds at least, of the same."""
        return sum(work.bound for work in self.work.values())

    @property
    def bytes(self) -> float:
        """Read from and written to the device's memory."""
        return sum(work.bytes for work in self.work.values())


def step_cost(program: Program, peaks: Hardware) -> StepCost:
    """The cost of one call of a program for TPUs.

    Args:
        program: The compiled step.
        peaks: The device's; it has a clock.
    """
    clock = peaks.clock or math.inf
    work: dict[str, Work] = defaultdict(Work)
    sent: dict[str, int] = defaultdict(int)
    waited: dict[str, int] = defaultdict(int)
    kernels: dict[str, float] = defaultdict(float)
    waited_bytes = 0.0
    for computation, instruction, times in program.runs():
        kind = kind_of(program, computation, instruction)
        flops = program.flops(computation, instruction)
        moved = program.bytes_moved(computation, instruction)
        seconds, least = (instruction.cycles or 0) / clock, max(flops / peaks.flops, moved / peaks.bandwidth)
        least = 0.0 if _collective(program, instruction) else least
        work[kind] += Work(seconds * times, least * times, flops * times, moved * times, times)
        if collective := _collective(program, instruction):
            sent[collective] += times
            if instruction.opcode in _SENDS:
                waited[collective] += times
                waited_bytes += times * sum(array.size for array in instruction.arrays)
        if instruction.target == "tpu_custom_call" and kind != ATTENTION:
            kernels[instruction.name.rstrip(".0123456789")] += times * kernel_flops(program, computation, instruction)
    return StepCost(dict(work), dict(sent), dict(waited), waited_bytes, dict(kernels))


def kind_of(program: Program, computation: str, instruction: Instruction) -> str:
    """The kind of work, one of `KINDS`, that an instruction is part of."""
    if _collective(program, instruction):
        return "collectives"
    place, part = instruction.op_name, part_of(instruction.op_name)
    if part in _OF_PARTS:
        return _OF_PARTS[part]
    for kind, pattern in _TRACES.items():
        if re.search(pattern, f"{place} {instruction.name}"):
            return kind
    products = list(program.products(computation, instruction))
    if products:
        return BASE if max(_intensity(program, *product) for product in products) >= _THIN else ADAPTERS
    if _has_codes(program, computation, instruction):
        return "dequantising"
    if _has_heads(instruction):
        return LAYOUT
    return ADAPTERS if part == "lora" else "others"


def kernel_flops(program: Program, computation: str, kernel: Instruction) -> float:
    """FLOP of a Pallas kernel that multiplies, as its operands' shapes tell; 0 where they do not.

    XLA sees nothing of what is in a kernel. Of attention the caller knows more.
    """
    given = [array.shape for array in kernel.arrays if len(array.shape) > 1]
    shapes = program.shapes_of(computation)
    taken = [array.shape for name in kernel.operands for array in arrays(shapes.get(name, "")) if len(array.shape) > 1]
    if len(given) != 1 or len(taken) < 2:
        return 0.0
    *rows, columns = given[0]
    summed = {axis for axis in taken[0] if axis not in given[0]} & {axis for axis in taken[1] if axis != columns}
    return 2.0 * math.prod(rows) * columns * max(summed, default=0)


def _collective(program: Program, instruction: Instruction) -> str:
    """The kind of collective that an instruction is or begins; empty where it is none, or the end of one."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _SENDS:
        return opcode
    if instruction.opcode in ("async-start", "fusion") and "done" not in instruction.name:
        for inner in program.computations.get(instruction.called, ()):
            if inner.opcode.removesuffix("-start") in _SENDS:
                return inner.opcode.removesuffix("-start")
    return ""


def _intensity(program: Program, computation: str, product: Instruction) -> float:
    """FLOP of a product for each number of the largest array that is part of it."""
    shapes = program.shapes_of(computation)
    sizes = [array.shape for name in product.operands for array in arrays(shapes.get(name, ""))]
    largest = max((math.prod(shape) for shape in (*sizes, product.arrays[0].shape)), default=1)
    return program.flops(computation, product) / max(largest, 1)


def _has_codes(program: Program, computation: str, instruction: Instruction) -> bool:
    """Whether it gives or takes a matrix of bytes, which nothing but a quantised weight is."""
    shapes = program.shapes_of(computation)
    found = [*instruction.arrays, *(array for name in instruction.operands for array in arrays(shapes.get(name, "")))]
    return any(array.dtype in ("u8", "s8") and len(array.shape) > 1 for array in found)


def _has_heads(instruction: Instruction) -> bool:
    """Whether it gives an array of every position's heads, `[batch, seq, heads, head_dim]` in any order."""
    return any(len(array.shape) >= 4 and array.shape[-1] <= 256 for array in instruction.arrays)


def seconds_waited(cost: StepCost, peaks: Hardware) -> float:
    """What sending takes while nothing else runs, by the bandwidth between devices; 0 where that is not known."""
    return 0.0 if peaks.interconnect is None else cost.waited_bytes / peaks.interconnect
