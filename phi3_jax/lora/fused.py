"""Adapters of slices as one adapter of the fused layer, and back.

What PEFT has for a fused layer is one A and one B. The adapters A_i, B_i of its slices are such a pair
exactly: A' = [A_1; A_2; …], and B' holds each B_i in the rows of its slice and in the columns of A_i,
with zeros elsewhere. The scale is the same, so at the rank r' = Σ r_i it takes another α.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from phi3_jax.config.lora import FrozenDict
from phi3_jax.lora.adapters import DoraLinear, LoraLinear
from phi3_jax.lora.targets import adaptable_modules, slices
from phi3_jax.lora.tree import Slice
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import last_part
from phi3_jax.system.errors import InputError

Plain = LoraLinear | DoraLinear


def slice_table(model: Phi3ForCausalLM) -> FrozenDict:
    """Name of a slice -> `Slice`, in the order of the rows."""
    total = {module.name: module.shape[0] for module in adaptable_modules(model)}
    return FrozenDict(
        {m.name: Slice(m.parent, m.rows.start, m.rows.stop, total[m.parent], m.name) for m in slices(model)}
    )


def fused(parts: Sequence[tuple[Slice, Any]]) -> Plain:
    """One adapter of a fused layer that computes what the adapters of its slices do.

    Where the slices' scales differ they are moved into B.

    **Arguments**: `parts`, plain adapters of one layer, each with its slice.

    Raises `InputError` for DoRA on some of the slices: PEFT's has a magnitude for every row.
    """
    parts = sorted(parts, key=lambda part: part[0])
    scales = {adapter.scaling for _, adapter in parts}
    scaling = scales.pop() if len(scales) == 1 else 1.0
    adapters = [adapter.rescaled(scaling, adapter.rank) for _, adapter in parts]
    total, first = parts[0][0].total, adapters[0]
    rank = sum(adapter.rank for adapter in adapters)
    b = np.zeros((total, rank), np.float32)
    column = 0
    for (rows, _), adapter in zip(parts, adapters, strict=True):
        b[rows.start : rows.stop, column : column + adapter.rank] = adapter.lora_B
        column += adapter.rank
    whole: Any = replace(first, lora_A=np.concatenate([adapter.lora_A for adapter in adapters]), lora_B=b)
    if isinstance(first, DoraLinear):
        if sum(rows.stop - rows.start for rows, _ in parts) < total:
            layer = last_part(parts[0][0].parent)
            raise InputError(
                f"DoRA on some slices of {layer} only: PEFT's has a magnitude for every row; adapt them all"
            )
        return replace(whole, magnitude=np.concatenate([adapter.magnitude for adapter in adapters]))
    if all(adapter.lora_bias is None for adapter in adapters):
        return whole
    bias = np.zeros(total, np.float32)
    for (rows, _), adapter in zip(parts, adapters, strict=True):
        if adapter.lora_bias is not None:
            bias[rows.start : rows.stop] = adapter.lora_bias
    return replace(whole, lora_bias=bias)


def parted(adapter: Plain, blocks: Sequence[tuple[Slice, int, float]]) -> list[Plain]:
    """The reverse of `fused`: the adapter of each slice.

    **Arguments**: `blocks`, each slice with its rank and scale, in the order of the columns.
    """
    parts, column = [], 0
    for rows, rank, scaling in blocks:
        columns, column = slice(column, column + rank), column + rank
        b = adapter.lora_B[rows.start : rows.stop, columns]
        part: Any = replace(adapter, lora_A=adapter.lora_A[columns], lora_B=b)
        if isinstance(adapter, DoraLinear):
            part = replace(part, magnitude=adapter.magnitude[rows.start : rows.stop])
        elif adapter.lora_bias is not None:
            part = replace(part, lora_bias=adapter.lora_bias[rows.start : rows.stop])
        parts.append(part if scaling == adapter.scaling else _unscaled(part, scaling))
    return parts


def _unscaled(adapter: Any, scaling: float) -> Any:
    """What becomes `adapter` when its scale is moved into B."""
    # The quotient of a rounded product may have another last bit than the factor had, but gives that product
    # again; the product with 1/factor may not.
    factor = np.float32(scaling / adapter.scaling)
    bias = getattr(adapter, "lora_bias", None)
    whole = replace(adapter, lora_B=adapter.lora_B / factor, scaling=scaling)
    return whole if bias is None else replace(whole, lora_bias=bias / factor)


def find_blocks(adapters: Sequence[Any], rows: Sequence[Slice]) -> list[tuple[Slice, int]] | None:
    """The slices that adapters of fused layers are made of, each with its rank; None where they are not.

    They are where each column of B has numbers in the rows of one slice only, the columns of a slice
    lie together in the order of the rows, and bias or magnitude speak of no other rows. A column that is
    zero in all the layers could be of any slice: then they are not.

    **Arguments**: `adapters`, of the same module and rank, in one layer or several.
    """
    used = np.array([[_any(a.lora_B[s.start : s.stop], axis=0) for s in rows] for a in adapters]).any(axis=0)
    if not (used.sum(axis=0) == 1).all():
        return None
    owner = used.argmax(axis=0)
    if (np.diff(owner) < 0).any():
        return None
    ranks = [(s, int((owner == i).sum())) for i, s in enumerate(rows)]
    idle = [s for s, rank in ranks if rank == 0]
    if idle and isinstance(adapters[0], DoraLinear):
        return None
    if any(a.lora_bias is not None and _any(a.lora_bias[s.start : s.stop]) for s in idle for a in adapters):
        return None
    return [(s, rank) for s, rank in ranks if rank]


def fits(adapter: Plain, blocks: Sequence[tuple[Slice, int]]) -> bool:
    """Whether an adapter of a fused layer is made of these slices with these ranks."""
    if sum(rank for _, rank in blocks) != adapter.rank:
        return False
    rows = [rows for rows, _ in blocks]
    try:
        again = fused(list(zip(rows, parted(adapter, [(s, r, adapter.scaling) for s, r in blocks]), strict=True)))
    except InputError:
        return False
    pairs = [(a.lora_B, getattr(a, "lora_bias", None)) for a in (again, adapter)]
    return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


def _any(array: Any, axis: int | None = None) -> Any:
    return np.asarray(array != 0).any(axis=axis)
