"""Adapters of slices as one adapter of the fused layer, and back.

What PEFT has for a fused layer is one A and one B. The adapters A_i, B_i of its slices are such a pair
exactly: A' = [A_1; A_2; …], and B' holds each B_i in the rows of its slice and in the columns of A_i,
with zeros elsewhere. The scale is the same, so at the rank r' = Σ r_i it takes another α.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from phi3_jax.config.lora import FrozenDict
from phi3_jax.lora.adapters import DoraLinear, LoraLinear
from phi3_jax.lora.stack import common_scale, rescaled
from phi3_jax.lora.targets import adaptable_modules, slices
from phi3_jax.lora.tree import Slice
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.system.dotted import last_part
from phi3_jax.system.errors import InputError

Plain = LoraLinear | DoraLinear


def slice_table(model: Phi3ForCausalLM) -> FrozenDict[Slice]:
    """Name of a slice -> `Slice`, in the order of the rows."""
    total = {module.name: module.shape[0] for module in adaptable_modules(model)}
    return FrozenDict(
        {m.name: Slice(m.parent, m.rows.start, m.rows.stop, total[m.parent], m.name) for m in slices(model)}
    )


def fused(parts: Sequence[tuple[Slice, Plain]]) -> Plain:
    """One adapter of a fused layer that computes what the adapters of its slices do.

    Where the slices' scales differ they are moved into B.

    Args:
        parts: Plain adapters of one layer, of one kind, each with its slice.

    Raises:
        InputError: For DoRA on some of the slices: PEFT's has a magnitude for every row.
    """
    parts = sorted(parts, key=lambda part: part[0])
    scaling = common_scale(adapter for _, adapter in parts)
    adapters = [rescaled(adapter, scaling, adapter.rank) for _, adapter in parts]
    total, first = parts[0][0].total, adapters[0]
    rank = sum(adapter.rank for adapter in adapters)
    b = np.zeros((total, rank), np.float32)
    column = 0
    for (rows, _), adapter in zip(parts, adapters, strict=True):
        b[rows.start : rows.stop, column : column + adapter.rank] = adapter.lora_B
        column += adapter.rank
    changed: dict[str, Any] = {"lora_A": np.concatenate([adapter.lora_A for adapter in adapters]), "lora_B": b}
    whole = replace(first, **changed)
    if isinstance(first, DoraLinear) and sum(rows.stop - rows.start for rows, _ in parts) < total:
        raise InputError(
            f"DoRA on some slices of {last_part(parts[0][0].parent)} only: PEFT's has a magnitude for every row; "
            "adapt them all"
        )
    per_row = np.zeros(total, np.float32)
    found = [(rows, _per_row(adapter)) for (rows, _), adapter in zip(parts, adapters, strict=True)]
    for rows, values in found:
        if values is not None:
            per_row[rows.start : rows.stop] = values
    return _with_per_row(whole, None if all(values is None for _, values in found) else per_row)


def split(adapter: Plain, blocks: Sequence[tuple[Slice, int, float]]) -> list[Plain]:
    """The reverse of `fused`: the adapter of each slice.

    Args:
        adapter: Of one layer.
        blocks: Each slice with its rank and scale, in the order of the columns.
    """
    parts, column = [], 0
    for rows, rank, scaling in blocks:
        columns, column = slice(column, column + rank), column + rank
        b = adapter.lora_B[rows.start : rows.stop, columns]
        part = replace(adapter, lora_A=adapter.lora_A[columns], lora_B=b)
        values = _per_row(adapter)
        part = _with_per_row(part, None if values is None else values[rows.start : rows.stop])
        parts.append(part if scaling == adapter.scaling else _unscaled(part, scaling))
    return parts


def _per_row(adapter: Plain) -> Float[Array, "out"] | None:
    """What it has of numbers for each row of the output beside B."""
    return adapter.magnitude if isinstance(adapter, DoraLinear) else adapter.lora_bias


def _with_per_row(adapter: Plain, values: Any) -> Plain:
    if isinstance(adapter, DoraLinear):
        return replace(adapter, magnitude=values)
    return replace(adapter, lora_bias=values)


def _unscaled(adapter: Plain, scaling: float) -> Plain:
    """What becomes `adapter` when its scale is moved into B."""
    # The quotient of a rounded product may have another last bit than the factor had, but gives that product
    # again; the product with 1/factor may not.
    factor = np.float32(scaling / adapter.scaling)
    whole = replace(adapter, lora_B=adapter.lora_B / factor, scaling=scaling)
    if isinstance(whole, DoraLinear) or whole.lora_bias is None:
        return whole
    return replace(whole, lora_bias=whole.lora_bias / factor)


def find_blocks(adapters: Sequence[Plain], rows: Sequence[Slice]) -> list[tuple[Slice, int]] | None:
    """The slices that adapters of fused layers are made of, each with its rank; None where they are not.

    They are where each column of B has numbers in the rows of one slice only, the columns of a slice
    lie together in the order of the rows, and bias or magnitude speak of no other rows. A column that is
    zero in all the layers could be of any slice: then they are not.

    Args:
        adapters: Of the same module, kind and rank, in one layer or several.
        rows: The slices that there may be, in their order.
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
    for values in map(_per_row, adapters):
        if values is not None and any(_any(values[s.start : s.stop]) for s in idle):
            return None
    return [(s, rank) for s, rank in ranks if rank]


def fits(adapter: Plain, blocks: Sequence[tuple[Slice, int]]) -> bool:
    """Whether an adapter of a fused layer is made of these slices with these ranks."""
    if sum(rank for _, rank in blocks) != adapter.rank:
        return False
    rows = [rows for rows, _ in blocks]
    try:
        again = fused(list(zip(rows, split(adapter, [(s, r, adapter.scaling) for s, r in blocks]), strict=True)))
    except InputError:
        return False
    pairs = [(a.lora_B, None if isinstance(a, DoraLinear) else a.lora_bias) for a in (again, adapter)]
    return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


def _any(array: Array, axis: int | None = None) -> Bool[np.ndarray, "*rest"]:
    return np.asarray((array != 0).any(axis=axis))
