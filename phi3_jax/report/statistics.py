"""How sure a figure is: bootstrap intervals over rows, and tests of two models on the same rows.

A figure is a function of sums over rows: the mean of a value, the perplexity of summed losses and
token counts, BLEU of n-gram counts. So resampling rows is a product of a matrix of counts with the
rows' columns, and every figure of a set is resampled in the same way.
"""

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike

# From the columns' sums over rows, `[samples, columns]`, to a figure for each sample.
Statistic = Callable[[Float[ndarray, "samples columns"]], Float[ndarray, "samples"]]
Interval = tuple[float, float]

_CHUNK = 2**22  # numbers of the matrix of counts that are in memory at once


def mean(sums: Float[ndarray, "samples columns"]) -> Float[ndarray, "samples"]:
    """The first column over the second, which for a plain mean is 1 in every row."""
    means: Float[ndarray, "samples"] = sums[:, 0] / sums[:, 1]
    return means


def estimate(values: ArrayLike, *, statistic: Statistic = mean) -> float:
    """The figure of all rows.

    Args:
        values: One for each row, or `[rows, columns]` that `statistic` wants the sums of.
        statistic: What makes the figure of the sums.

    Raises:
        ValueError: There are no rows.

    Example:
        >>> estimate([1.0, 0.0, 1.0, 1.0])
        0.75
    """
    return _of_sums(statistic, _columns(values).sum(axis=0))


def bootstrap_interval(
    values: ArrayLike, *, statistic: Statistic = mean, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """The interval that holds `confidence` of the figures of rows drawn anew with replacement.

    The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        values: One for each row, or `[rows, columns]` that `statistic` wants the sums of.
        statistic: What makes the figure of the sums.
        confidence: Share of the draws within the interval.
        samples: How many times as many rows are drawn as there are.
        seed: Of the draws.

    Raises:
        ValueError: There are no rows.

    Example:
        >>> low, high = bootstrap_interval([1.0, 0.0, 1.0, 1.0] * 25)
        >>> print(f"{low:.2f} to {high:.2f}")
        0.67 to 0.83
    """
    columns = _columns(values)
    return _bootstrap(lambda counts: statistic(counts @ columns), len(columns), confidence, samples, seed)


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    statistic: Statistic = mean,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of a's figure minus b's, where row `i` of both is the same row of a data set.

    Each draw takes the same rows of both, so that what is hard for both does not count.

    Args:
        a: Values as `bootstrap_interval` takes them.
        b: The other model's.
        statistic: What makes the figure of the sums.
        confidence: Share of the draws within the interval.
        samples: How many times as many rows are drawn as there are.
        seed: Of the draws.

    Raises:
        ValueError: They have different numbers of rows, or none.
    """
    one, other = _paired(a, b)
    return _bootstrap(
        lambda counts: statistic(counts @ one) - statistic(counts @ other), len(one), confidence, samples, seed
    )


def _bootstrap(
    figure: Callable[[Float[ndarray, "draws rows"]], Float[ndarray, "draws"]],
    rows: int,
    confidence: float,
    samples: int,
    seed: int,
) -> Interval:
    """The interval of a function of how often each row is drawn."""
    if rows == 1:  # always drawn; scipy wants two
        (value,) = figure(np.ones((1, 1))).tolist()
        return value, value
    # Takes half a second, which a run without an evaluation spares.
    from scipy.stats import DegenerateDataWarning, bootstrap

    def of_draws(drawn: Int[ndarray, "*draws rows"], axis: int) -> Float[ndarray, "*draws"]:
        del axis  # always the last
        draws = drawn.reshape(-1, rows)
        places = draws + rows * np.arange(len(draws))[:, None]
        counts = np.bincount(places.ravel(), minlength=draws.size).reshape(draws.shape).astype(np.float64)
        return figure(counts).reshape(drawn.shape[:-1])

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # Of a figure that is not a number so is the interval; scipy would tell of another method's.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (np.arange(rows),),
            of_draws,
            n_resamples=samples,
            batch=max(1, _CHUNK // rows),
            vectorized=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)


def paired_test(
    a: ArrayLike, b: ArrayLike, *, statistic: Statistic = mean, samples: int = 10_000, seed: int = 0
) -> float:
    """How likely a difference at least as large, either way, is if it were chance which row is whose.

    Approximate randomisation: the rows of a and b change places at random, which for means is the
    sign-flip permutation test (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; Riezler
    and Maxwell, https://aclanthology.org/W05-0908). Exact where all ways to change places are no more
    than `samples`; otherwise (hits + 1) / (samples + 1), so never 0.

    Args:
        a: Values as `bootstrap_interval` takes them.
        b: The other model's, row by row.
        statistic: What makes the figure of the sums.
        samples: How many ways to change places are tried.
        seed: Of the ways.

    Raises:
        ValueError: They have different numbers of rows, or none.

    Example:
        >>> paired_test([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])
        0.25
    """
    one, other = _paired(a, b)
    total_a, total_b = one.sum(axis=0), other.sum(axis=0)
    change = (other - one)[np.any(one != other, axis=1)]  # rows that are alike change nothing
    if not len(change):
        return 1.0
    observed = abs(_of_sums(statistic, total_a) - _of_sums(statistic, total_b))
    least = observed - 1e-9 * max(1.0, observed)  # sums in another order differ in their last bits
    exact = 2 ** len(change) <= samples
    hits = count = 0
    for swapped in _all_swaps(len(change)) if exact else _random_swaps(len(change), samples, seed):
        moved = swapped @ change
        differences = statistic(total_a + moved) - statistic(total_b - moved)
        hits += int(np.sum(np.abs(differences) >= least))
        count += len(differences)
    return hits / count if exact else (hits + 1) / (count + 1)


# A bit for each swap: scipy.stats.permutation_test, which permutes each pair by itself, takes 10 to 17 times as
# long for thousands of rows.
def _random_swaps(rows: int, samples: int, seed: int) -> Iterator[Float[ndarray, "chunk rows"]]:
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // rows)
    for start in range(0, samples, size):
        chunk = min(size, samples - start)
        bits = np.unpackbits(np.frombuffer(rng.bytes(chunk * math.ceil(rows / 8)), np.uint8).reshape(chunk, -1), axis=1)
        yield bits[:, :rows].astype(np.float64)


def _all_swaps(rows: int) -> Iterator[Float[ndarray, "chunk rows"]]:
    yield ((np.arange(2**rows)[:, None] >> np.arange(rows)) & 1).astype(np.float64)


def _of_sums(statistic: Statistic, sums: Float[ndarray, "columns"]) -> float:
    return float(statistic(sums[None])[0])


def _columns(values: ArrayLike) -> Float[ndarray, "rows columns"]:
    columns = np.asarray(values, np.float64)
    if not len(columns):
        raise ValueError("there are no rows to take a figure of")
    return np.stack([columns, np.ones_like(columns)], axis=1) if columns.ndim == 1 else columns


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Float[ndarray, "rows columns"], Float[ndarray, "rows columns"]]:
    one, other = _columns(a), _columns(b)
    if one.shape != other.shape:
        raise ValueError(f"the rows are not paired: {one.shape} values on one side, {other.shape} on the other")
    return one, other
