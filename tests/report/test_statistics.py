"""Intervals and tests, held against scipy's, and against what they promise."""

import numpy as np
import pytest

from phi3_jax.report.statistics import bootstrap_difference, bootstrap_interval, estimate, paired_test

stats = pytest.importorskip("scipy.stats")
RNG = np.random.default_rng(0)
LOSSES = RNG.gamma(2.0, 3.0, 60)
TOKENS = RNG.integers(1, 20, 60).astype(float)


def perplexity(sums):
    return np.exp(sums[:, 0] / sums[:, 1] / 10)


@pytest.mark.parametrize("figure", ["mean", "perplexity"])
def test_the_interval_is_scipys_percentile_interval(figure):
    if figure == "mean":
        ours = bootstrap_interval(LOSSES, confidence=0.9, samples=40_000)
        theirs = stats.bootstrap(
            (LOSSES,),
            np.mean,
            confidence_level=0.9,
            n_resamples=40_000,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        assert estimate(LOSSES) == pytest.approx(LOSSES.mean())
    else:
        columns = np.stack([LOSSES, TOKENS], axis=1)
        ours = bootstrap_interval(columns, statistic=perplexity, confidence=0.9, samples=40_000)
        theirs = stats.bootstrap(
            (LOSSES, TOKENS),
            lambda loss, tokens, axis: np.exp(loss.sum(axis) / tokens.sum(axis) / 10),
            paired=True,
            vectorized=True,
            confidence_level=0.9,
            n_resamples=40_000,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        assert estimate(columns, statistic=perplexity) == pytest.approx(np.exp(LOSSES.sum() / TOKENS.sum() / 10))
    # Quantiles of 40,000 draws are sure to about 1% of the spread.
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.03 * theirs.standard_error)


def test_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(rng.exponential(1.0, 80), samples=400, seed=trial)
        hits += low <= 1.0 <= high
    # 95% less what skewed data of 80 rows cost the percentile interval; the binomial's own spread is 1.1%.
    assert 0.90 <= hits / 400 <= 0.975


def test_a_difference_is_of_the_same_rows():
    noise = RNG.normal(0, 10, 200)
    a, b = noise + 0.5 + RNG.normal(0, 0.1, 200), noise
    low, high = bootstrap_difference(a, b)
    assert low < (a - b).mean() < high
    assert high - low < 0.06, "as wide as if the rows were not paired"
    assert bootstrap_difference(b, a) == pytest.approx((-high, -low), abs=5e-3)


def test_draws_in_parts_are_the_same_draws(monkeypatch):
    whole = bootstrap_interval(LOSSES, samples=500), paired_test(LOSSES, TOKENS, samples=500)
    monkeypatch.setattr("phi3_jax.report.statistics._CHUNK", 60 * 100)
    parts = bootstrap_interval(LOSSES, samples=500), paired_test(LOSSES, TOKENS, samples=500)
    assert parts == whole
    assert bootstrap_interval(LOSSES, samples=500, seed=1) != whole[0]


def test_few_rows_are_tested_exactly():
    a, b = RNG.normal(0.4, 1, 12), RNG.normal(0, 1, 12)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired_test(a, b) == pytest.approx(theirs.pvalue, rel=1e-12)
    # Rows that are alike in both change nothing, and need no way to be swapped.
    same = RNG.normal(size=500)
    assert paired_test(np.append(a, same), np.append(b, same)) == pytest.approx(theirs.pvalue, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_many_rows_are_tested_as_scipy_does(shift):
    rng = np.random.default_rng(5)
    a, b = rng.normal(shift, 1, 120), rng.normal(0, 1, 120)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True, rng=rng
    )
    assert paired_test(a, b) == pytest.approx(theirs.pvalue, abs=0.02)


def test_figures_of_the_whole_set_are_tested_by_swapping_rows():
    losses = np.stack([LOSSES, TOKENS], axis=1)
    other = np.stack([LOSSES + RNG.normal(0.5, 2, 60), TOKENS], axis=1)
    theirs = stats.permutation_test(
        (losses[:, 0], other[:, 0]),
        lambda x, y, axis: np.exp(x.sum(axis) / TOKENS.sum() / 10) - np.exp(y.sum(axis) / TOKENS.sum() / 10),
        permutation_type="samples",
        vectorized=True,
        rng=RNG,
    )
    assert paired_test(losses, other, statistic=perplexity) == pytest.approx(theirs.pvalue, abs=0.02)


def test_the_test_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(8)
    p = np.array([paired_test(*rng.normal(0, 1, (2, 30)), samples=200, seed=i) for i in range(400)])
    assert 0.02 <= np.mean(p <= 0.05) <= 0.08
    assert 0.42 <= np.mean(p <= 0.5) <= 0.58


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_of_what_is_not_finite_the_interval_is_so_without_a_warning(loss):
    """The loss of a model with weights that are not finite: the run says so, in words of its own."""
    assert not np.isfinite(bootstrap_interval([loss, 1.0, 2.0] + 40 * [loss])).any()


def test_edges():
    assert paired_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired_test(np.ones(40), np.zeros(40)) == pytest.approx(1 / 10_001)  # never 0
    assert bootstrap_interval([0.3]) == pytest.approx((0.3, 0.3))
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="not paired"):
        paired_test([1.0], [1.0, 2.0])
