"""Several hosts prepare a share of the rows each, and then all have the whole: the same as one host makes.

Each renders and tokenises its rows, neighbours in the set; tokens, targets and texts go from host to host over the
devices, counts and what there is to say through the coordinator.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from phi3_jax.data.rows import MOST_NAMED, DataStats
from phi3_jax.parallel.distributed import exchange, joined, together
from phi3_jax.system.compat_jax import distributed_state
from phi3_jax.system.errors import InputError

LEAST_SHARED = 1000  # fewer are rendered faster than processes have told one another of them

T = TypeVar("T")


def own_share(rows: Sequence[T]) -> Sequence[T]:
    """The rows that fall to this process: neighbours, and those of the first process are the first.

    Example:
        >>> own_share(["a", "b"])  # of a single process
        ['a', 'b']
    """
    state = distributed_state()
    first, last = (len(rows) * number // state.num_processes for number in (state.process_id, state.process_id + 1))
    return rows[first:last]


def made_together(make: Callable[[], T]) -> T:
    """What `make` gives in this process, if it does so in all.

    Raises:
        InputError: In all of them, as the first one's `make` does, whose rows come before the others'.
        RuntimeError: Where it fails in another way in another process.
    """
    made: list[T] = []
    error: InputError | None = None
    with together():
        try:
            made.append(make())
        except InputError as raised:
            error = raised
    said = next(filter(None, exchange("" if error is None else str(error))), None)
    if said is not None:
        raise InputError(said) from error
    return made[0]


def all_of(arrays: Mapping[str, Shaped[ndarray, "_"]]) -> dict[str, Shaped[ndarray, "_"]]:
    """The shares' arrays (`Collected.arrays`), put together in the order of processes."""
    offsets = ("offsets", "reference_offsets")
    # Where rows begin differs from share to share, how long they are does not.
    whole = {name: joined(np.diff(array) if name in offsets else array) for name, array in arrays.items()}
    return {name: _starts(array) if name in offsets else array for name, array in whole.items()}


def _starts(lengths: Shaped[ndarray, "rows"]) -> Shaped[ndarray, "rows+1"]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def all_counts(own: DataStats) -> DataStats:
    """The shares' counts, as those of all rows."""
    parts = [json.loads(answer) for answer in exchange(json.dumps(own.to_dict()))]
    return DataStats.from_dict({name: _joined(name, [part[name] for part in parts]) for name in parts[0]})


def _joined(name: str, values: Sequence[object]) -> object:
    """One field's value of all shares, in the order of processes: sums, lists of names, the first of its kind."""
    if name == "sources":
        return values[0]
    numbers = [value for value in values if isinstance(value, int)]
    if numbers:
        return max(numbers) if name == "longest" else sum(numbers)
    if isinstance(values[0], list):
        return list(itertools.chain.from_iterable(value for value in values if isinstance(value, list)))[:MOST_NAMED]
    if isinstance(values[0], dict):
        counts: Counter[str] = Counter()
        for value in values:
            counts.update(value if isinstance(value, dict) else {})
        return dict(counts)
    return next((value for value in values if value is not None), None)
