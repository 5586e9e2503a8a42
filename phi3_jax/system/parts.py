"""The parts of a step, by their `jax.named_scope`: in profiles, and in the text of compiled programs."""

import re
from typing import Literal

Phase = Literal["forward", "recomputed", "backward"]

# A scope within another is the more exact one: `attention/qkv_proj/lora/dropout` is dropout.
PARTS = (
    "embedding",
    "norm",
    "attention",
    "qkv_proj",
    "rope",
    "attend",
    "o_proj",
    "mlp",
    "gate_up_proj",
    "gated",
    "down_proj",
    "dequantise",
    "lora",
    "dropout",
    "loss",
    "optimizer",
)

# A step of a path, within the transformations that made it: `attend`, `jvp(loss)`, `transpose(jvp(loss))`.
_STEP = re.compile(r"(?:\w+\()*(\w+)\)*")


def part_of(op_name: str) -> str | None:
    """The part of a step that an operation belongs to, the innermost one; None for what is in none.

    Args:
        op_name: as XLA keeps it in an instruction's metadata, and profilers show it.

    Example:
        >>> part_of("jit(train_step)/jvp(jit(_forward))/while/body/attention/qkv_proj/lora/dot_general")
        'lora'
        >>> part_of("jit(train_step)/transpose(jvp(loss))/jit(_sums)/mul")
        'loss'
        >>> part_of("frozen['model']['lm_head']") is None
        True
    """
    steps = [_STEP.fullmatch(step) for step in op_name.split("/")]
    found = [step[1] for step in steps if step is not None and step[1] in PARTS]
    return found[-1] if found else None


def phase_of(op_name: str) -> Phase:
    """The pass that an operation belongs to, or that it is the forward pass made again for the backward one.

    Example:
        >>> phase_of("jit(step)/transpose(jvp(jit(_forward)))/while/body/checkpoint/rematted_computation/norm/mul")
        'recomputed'
    """
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"
