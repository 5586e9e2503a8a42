"""Which rows share a sequence, and in which order an epoch visits them.

Planned here, ahead of the pipeline, and not by Grain's streaming packers: a learning-rate schedule
must know the number of steps beforehand, and only a plan over all lengths gives it exactly.
"""

from collections import deque
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.config.sections import DataSection
from phi3_jax.data.pieces import BLOCK
from phi3_jax.data.rows import TokenizedRows


@dataclass(frozen=True)
class Order:
    """In which order the rows of a run come.

    Attributes:
        seed: Of what is drawn.
        group: Sequences of a step, where those of like length are to share one; None: they are not.
    """

    seed: int
    group: int | None = None


def plan_epoch(rows: TokenizedRows, data: DataSection, order: Order, epoch: int) -> list[list[int]]:
    """Sequences of an epoch, each a list of rows; every row occurs exactly once.

    With `data.shuffle` the order is drawn by Grain from `(seed, epoch)`. With `data.packing` rows
    are packed by best fit into `data.max_length` positions, the longest first if the order is free:
    that wastes least, and the number of sequences depends on the lengths alone, so that all epochs
    have equally many steps. Without shuffling rows are packed as they come. TRL's strategies pack
    once, in the rows' own order, and what is drawn is the order of the sequences.

    Args:
        rows: What there is, as `pieces` gives it.
        data: How it is packed.
        order: In which order it comes.
        epoch: Which one, from 0.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> offsets = np.cumsum([0, 3, 6, 5, 2])
        >>> rows = TokenizedRows(np.arange(16), np.ones(16, np.uint8), offsets, np.zeros(4, int), [""] * 4, DataStats())
        >>> data = DataSection(train="chats.jsonl", max_length=8, packing=True, shuffle=False)
        >>> plan_epoch(rows, data, Order(0), 0)
        [[0, 2], [1, 3]]
    """
    if data.packing and data.packs_as_trl:
        packed = packed_as_trl(rows, data)
        plan = [packed[index] for index in _drawn(len(packed), data, order.seed, epoch).tolist()]
    else:
        plan = _planned(rows.lengths, data, _drawn(len(rows), data, order.seed, epoch))
    return plan if order.group is None else grouped(plan, rows.lengths, order.group)


def _drawn(count: int, data: DataSection, seed: int, epoch: int) -> Int[ndarray, "count"]:
    if not data.shuffle:
        return np.arange(count)
    shuffled = grain.MapDataset.range(count).shuffle(seed=seed % 2**32)
    return np.array([shuffled[epoch * count + index] for index in range(count)])


def _planned(lengths: Int[ndarray, "rows"], data: DataSection, order: Int[ndarray, "rows"]) -> list[list[int]]:
    if not data.packing:
        return [[row] for row in order.tolist()]
    by_length = order[np.argsort(-lengths[order], kind="stable")] if data.shuffle else order
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    # Ordered by the longest row's turn, which favours neither full nor sparse sequences.
    return sorted(best_fit(lengths, by_length, data.limit), key=lambda rows: rank[rows[0]])


def packed_as_trl(rows: TokenizedRows, data: DataSection) -> list[list[int]]:
    """The sequences of `trl.pack_dataset`, in its order; of rows, or of their `pieces`.

    Example:
        >>> from phi3_jax.data.rows import DataStats
        >>> offsets = np.cumsum([0, 5, 2, 3, 1])
        >>> rows = TokenizedRows(np.arange(11), np.ones(11, np.uint8), offsets, np.zeros(4, int), [""] * 4, DataStats())
        >>> packed_as_trl(rows, DataSection(max_length=5, packing_strategy="bfd"))
        [[0], [2, 1], [3]]
    """
    count, lengths = len(rows), rows.lengths
    if data.packing_strategy == "wrapped":
        return [[piece] for piece in range(count)]
    starts = np.arange(0, count, BLOCK) if rows.blocks is None else rows.blocks
    found: list[list[int]] = []
    for block in np.split(np.arange(count), starts[1:]):
        by_length = block[np.argsort(-lengths[block], kind="stable")]
        found += best_fit(lengths, by_length, data.limit, oldest=True)
    return found


def grouped(plan: list[list[int]], lengths: Int[ndarray, "rows"], size: int) -> list[list[int]]:
    """The sequences sorted by length within stretches of up to 50 steps, the longest of all first.

    That is transformers' `LengthGroupedSampler`, with this plan's order in place of what that draws.

    Args:
        plan: Sequences in the order that was drawn.
        lengths: Of the rows.
        size: Sequences of a step.

    Example:
        >>> lengths = np.array([1, 3, 2, 9, 5, 4, 8, 7])
        >>> grouped([[row] for row in range(8)], lengths, 1)
        [[3], [0], [1], [2], [4], [5], [6], [7]]
    """
    total = [int(lengths[rows].sum()) for rows in plan]
    stretch = size * max(min(len(plan) // (size * 4), 50), 1)
    parts = [
        sorted(range(start, min(start + stretch, len(plan))), key=lambda index: -total[index])
        for start in range(0, len(plan), stretch)
    ]
    longest = max(range(len(parts)), key=lambda number: total[parts[number][0]])
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return [plan[index] for part in parts for index in part]


def best_fit(
    lengths: Int[ndarray, "rows"], order: Int[ndarray, "rows"], capacity: int, *, oldest: bool = False
) -> list[list[int]]:
    """Puts each row, in the given order, where it leaves the least space, else into a new bin.

    Args:
        lengths: Of all rows.
        order: Those that are packed.
        capacity: Of a bin.
        oldest: Of bins with equal space, whether the one is taken that has had it for longest, and not the last.

    Raises:
        ValueError: For a row longer than `capacity`.
    """
    bins: list[list[int]] = []
    bins_by_space: dict[int, deque[int]] = {}
    spaces = 0  # bit s is set where some bin has s positions left
    for row in order.tolist():
        length = int(lengths[row])
        if length > capacity:
            raise ValueError(f"row {row} has {length} tokens, more than {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            waiting = bins_by_space[space]
            index = waiting.popleft() if oldest else waiting.pop()
            if not waiting:
                spaces &= ~(1 << space)
            bins[index].append(row)
        else:
            space, index = capacity, len(bins)
            bins.append([row])
        bins_by_space.setdefault(space - length, deque()).append(index)
        spaces |= 1 << (space - length)
    return bins
