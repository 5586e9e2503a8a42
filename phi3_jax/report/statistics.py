"""How sure a figure is: bootstrap intervals over rows, and tests of two models on the same rows.

A figure is a function of sums over rows: the mean of a value, the perplexity of summed losses and
token counts, BLEU of n-gram counts. So resampling rows is a product of a matrix of counts with the
rows' columns, and every figure of a set is resampled in the same way.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Values = Float[ndarray, "rows"] | Float[ndarray, "rows columns"]
# From the columns' sums over rows, `[samples, columns]`, to a figure for each sample.
Statistic = Callable[[Float[ndarray, "samples columns"]], Float[ndarray, "samples"]]

_CHUNK = 2**22  # numbers of the matrix of counts that are in memory at once


def mean(sums: Float[ndarray, "samples columns"]) -> Float[ndarray, "samples"]:
    """The first column over the second, which for a plain mean is 1 in every row."""
    return sums[:, 0] / sums[:, 1]


def estimate(values: Values, *, statistic: Statistic = mean) -> float:
    """The figure of all rows."""
    return float(statistic(_columns(values).sum(axis=0, keepdims=True))[0])


def bootstrap_interval(
    values: Values, *, statistic: Statistic = mean, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The interval that holds `confidence` of the figures of rows drawn anew with replacement.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    **Arguments**
    - `values`: one for each row, or the columns that `statistic` wants the sums of.
    - `samples`: how many times as many rows are drawn as there are.

    Raises `ValueError` where there are no rows.
    """
    columns = _columns(values)
    draws = [statistic(counts @ columns) for counts in _resamples(len(columns), samples, seed)]
    return _percentiles(np.concatenate(draws), confidence)


def bootstrap_difference(
    a: Values,
    b: Values,
    *,
    statistic: Statistic = mean,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a's figure minus b's, where row `i` of both is the same row of a data set.

    Each draw takes the same rows of both, so that what is hard for both does not count.

    Raises `ValueError` where they have different numbers of rows, or none.
    """
    a, b = _paired(a, b)
    draws = [statistic(counts @ a) - statistic(counts @ b) for counts in _resamples(len(a), samples, seed)]
    return _percentiles(np.concatenate(draws), confidence)


def paired_test(a: Values, b: Values, *, statistic: Statistic = mean, samples: int = 10_000, seed: int = 0) -> float:
    """How likely a difference at least as large, either way, is if it were chance which row is whose.

    Approximate randomisation: the rows of a and b change places at random, which for means is the
    sign-flip permutation test (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; Riezler
    and Maxwell, https://aclanthology.org/W05-0908). Exact where all ways to change places are no more
    than `samples`; otherwise (hits + 1) / (samples + 1), so never 0.

    Raises `ValueError` where they have different numbers of rows, or none.
    """
    a, b = _paired(a, b)
    total_a, total_b = a.sum(axis=0), b.sum(axis=0)
    change = (b - a)[np.any(a != b, axis=1)]  # rows that are alike change nothing
    if not len(change):
        return 1.0
    observed = abs(float(statistic(total_a[None])[0] - statistic(total_b[None])[0]))
    least = observed - 1e-9 * max(1.0, observed)  # sums in another order differ in their last bits
    exact = 2 ** len(change) <= samples
    hits = count = 0
    for swapped in _all_swaps(len(change)) if exact else _random_swaps(len(change), samples, seed):
        moved = swapped @ change
        differences = statistic(total_a + moved) - statistic(total_b - moved)
        hits += int(np.sum(np.abs(differences) >= least))
        count += len(differences)
    return hits / count if exact else (hits + 1) / (count + 1)


def _columns(values: Values) -> Float[ndarray, "rows columns"]:
    columns = np.asarray(values, np.float64)
    if not len(columns):
        raise ValueError("there are no rows to take a figure of")
    return np.stack([columns, np.ones_like(columns)], axis=1) if columns.ndim == 1 else columns


def _paired(a: Values, b: Values) -> tuple[Float[ndarray, "rows columns"], Float[ndarray, "rows columns"]]:
    a, b = _columns(a), _columns(b)
    if a.shape != b.shape:
        raise ValueError(f"the rows are not paired: {a.shape} values on one side, {b.shape} on the other")
    return a, b


def _percentiles(draws: Float[ndarray, "samples"], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _chunks(rows: int, samples: int) -> Iterator[int]:
    size = max(1, _CHUNK // rows)
    for start in range(0, samples, size):
        yield min(size, samples - start)


def _resamples(rows: int, samples: int, seed: int) -> Iterator[Float[ndarray, "chunk rows"]]:
    """How often each row is drawn, in each of the samples."""
    rng = np.random.default_rng(seed)
    for chunk in _chunks(rows, samples):
        drawn = rng.integers(rows, size=(chunk, rows)) + rows * np.arange(chunk)[:, None]
        yield np.bincount(drawn.ravel(), minlength=chunk * rows).reshape(chunk, rows).astype(np.float64)


def _random_swaps(rows: int, samples: int, seed: int) -> Iterator[Float[ndarray, "chunk rows"]]:
    rng = np.random.default_rng(seed)
    for chunk in _chunks(rows, samples):
        bits = np.unpackbits(np.frombuffer(rng.bytes(chunk * math.ceil(rows / 8)), np.uint8).reshape(chunk, -1), axis=1)
        yield bits[:, :rows].astype(np.float64)


def _all_swaps(rows: int) -> Iterator[Float[ndarray, "chunk rows"]]:
    yield ((np.arange(2**rows)[:, None] >> np.arange(rows)) & 1).astype(np.float64)
