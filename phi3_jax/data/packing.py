"""Which rows share a sequence, and in which order an epoch visits them.

Planned here, ahead of the pipeline, and not by Grain's streaming packers: a learning-rate schedule
must know the number of steps beforehand, and only a plan over all lengths gives it exactly.
"""

import grain
import numpy as np
from jaxtyping import Int
from numpy import ndarray

from phi3_jax.config.sections import DataSection


def plan_epoch(lengths: Int[ndarray, "rows"], data: DataSection, *, seed: int, epoch: int) -> list[list[int]]:
    """Sequences of an epoch, each a list of rows; every row occurs exactly once.

    With `data.shuffle` the order is drawn by Grain from `(seed, epoch)`. With `data.packing` rows
    are packed by best fit into `data.max_length` positions, the longest first if the order is free:
    that wastes least, and the number of sequences depends on the lengths alone, so that all epochs
    have equally many steps. Without shuffling rows are packed as they come.

    Example:
        >>> data = DataSection(train="chats.jsonl", max_length=8, packing=True, shuffle=False)
        >>> plan_epoch(np.array([3, 6, 5, 2]), data, seed=0, epoch=0)
        [[0, 2], [1, 3]]
    """
    count = len(lengths)
    order = np.arange(count)
    if data.shuffle:
        shuffled = grain.MapDataset.range(count).shuffle(seed=seed % 2**32)
        order = np.array([shuffled[epoch * count + index] for index in range(count)])
    if not data.packing:
        return [[row] for row in order.tolist()]
    by_length = order[np.argsort(-lengths[order], kind="stable")] if data.shuffle else order
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    # Ordered by the longest row's turn, which favours neither full nor sparse sequences.
    return sorted(best_fit(lengths, by_length, data.max_length), key=lambda rows: rank[rows[0]])


def best_fit(lengths: Int[ndarray, "rows"], order: Int[ndarray, "rows"], capacity: int) -> list[list[int]]:
    """Puts each row, in the given order, where it leaves the least space, else into a new bin.

    Raises:
        ValueError: For a row longer than `capacity`.
    """
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set where some bin has s positions left
    for row in order.tolist():
        length = int(lengths[row])
        if length > capacity:
            raise ValueError(f"row {row} has {length} tokens, more than {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            index = bins_by_space[space].pop()
            if not bins_by_space[space]:
                spaces &= ~(1 << space)
            bins[index].append(row)
        else:
            space, index = capacity, len(bins)
            bins.append([row])
        bins_by_space.setdefault(space - length, []).append(index)
        spaces |= 1 << (space - length)
    return bins
