"""What leans on the insides of JAX's programs and on XLA's words; a test of each fails when the inside changes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.core import ShapedArray
    from jax.extend.core import Jaxpr, JaxprEqn, Primitive

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How XLA says that a program does not fit: "Used 17.41G of 15.75G hbm", or, where it need not compile to
# know, "the total memory required for HLO temporaries (29.50G) exceeds available HBM (15.75G)".
_NEEDED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])(?: of|\))")

# How it refuses an option of a program, on every platform, and a value, by XLA's own and by a plug-in's parser.
_NO_SUCH_OPTION = re.compile(r"No such compile option: '([^']+)'")
_WRONG_VALUE = re.compile(r"While setting option (\w+), (.+)|Failed to parse '[^']*' into flag (\w+):(.*)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of XLA's says that a device's memory does not suffice; it has one class for all errors."""
    return type(error).__name__ == "JaxRuntimeError" and bool(re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)))


def has_no_backend(error: BaseException) -> bool:
    """Whether JAX could not start the devices that it is told to use (JAX_PLATFORMS), for which it has no class and,
    where a plug-in is not installed, no words."""
    frames = traceback.extract_tb(error.__traceback__)
    is_there = bool(frames) and frames[-1].filename.endswith("xla_bridge.py")
    return is_there and isinstance(error, RuntimeError | AssertionError)


def bytes_needed(error: BaseException) -> int | None:
    """The bytes that a program would take, of XLA's complaint that it does not fit; None for another complaint."""
    found = _NEEDED.search(str(error)) if is_out_of_memory(error) else None
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


@dataclass(frozen=True)
class RefusedOption:
    """An option that XLA does not compile with.

    Attributes:
        name: The option's.
        reason: XLA's own words on its value; empty where it does not know the option.
    """

    name: str
    reason: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it is the value that is wrong."""
        return bool(self.reason)


def refused_option(error: BaseException) -> RefusedOption | None:
    """The compiler option that XLA complains of; None for another complaint.

    Example:
        >>> import jax
        >>> refused_option(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_of_tomorrow'"))
        RefusedOption(name='xla_of_tomorrow', reason='')
    """
    if type(error).__name__ != "JaxRuntimeError":
        return None
    text = " ".join(str(error).split())
    if unknown := _NO_SUCH_OPTION.search(text):
        return RefusedOption(unknown[1])
    wrong = _WRONG_VALUE.search(text)
    return (
        RefusedOption(wrong[1] or wrong[3], (wrong[2] or wrong[4] or "").strip(" .:") or "no reason given")
        if wrong
        else None
    )


def is_not_a_slice(primitive: Primitive, *_: object, **__: object) -> bool:
    """What the backward pass may keep, as a policy of `jax.checkpoint` by the primitive's name.

    All but mere slices of what is in memory anyway, such as a layer's weights out of the stack, what is gathered
    from other devices, and quantised weights made dense.
    """
    slices = ("custom_vjp_call", "optimization_barrier", "dynamic_slice", "squeeze")  # of `layer_weight`
    return primitive.name not in (*slices, "sharding_constraint", "all_gather")


def is_cudnn_attention(primitive: Primitive, *_: object, **__: object) -> bool:
    """Whether it is cuDNN's attention, whose results have no names; a policy of `jax.checkpoint` too."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def scans(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The scans in a traced program, and in the programs that its equations hold, by the primitive's name."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


def stacked_outputs(scan: JaxprEqn) -> list[ShapedArray]:
    """What a scan gives for each of its turns; what it carries has the same shape within it and after it."""
    from jax.core import ShapedArray

    turns = scan.params["jaxpr"].jaxpr.outvars
    shapes = [(inner.aval.shape, outer.aval) for inner, outer in zip(turns, scan.outvars, strict=True)]
    return [whole for shape, whole in shapes if isinstance(whole, ShapedArray) and shape != whole.shape]
