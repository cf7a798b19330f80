"""Intervals and shares against closed forms, scipy, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from suasion.core.errors import DataError
from suasion.evaluate.statistics import (
    bootstrap_interval,
    longer_wins,
    pair_accuracy,
    wilson_interval,
    win_rate,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (1, 9), (13, 37), (539, 812), (41, 41)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(hits: int, n: int, level: float) -> None:
    """Ends and middle of the range, three levels."""
    theirs = stats.binomtest(hits, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson_interval(hits, n, level=level) == pytest.approx(
        (theirs.low, theirs.high), rel=1e-12, abs=1e-15
    )


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_ends_solve_the_equation_that_defines_them(
    n: int, share: float, level: float
) -> None:
    """The defining quadratic, for any share."""
    hits = share * n
    z = stats.norm.isf((1 - level) / 2)
    for end in wilson_interval(hits, n, level=level):
        assert 0 <= end <= 1
        distance = (hits / n - end) ** 2
        assert distance == pytest.approx(z * z * end * (1 - end) / n, rel=1e-6, abs=1e-12)


def test_wilson_is_not_the_normal_interval() -> None:
    """Negative control: the textbook interval is elsewhere."""
    share, n = 2 / 11, 11
    normal = 1.959964 * math.sqrt(share * (1 - share) / n)
    low, high = wilson_interval(2, n)
    assert low > share - normal + 0.05
    assert high > share + normal + 0.05


def test_bootstrap_agrees_with_every_possible_resample() -> None:
    """All 256 resamples of four values, enumerated."""
    values = [0.31, -1.7, 2.9, 0.05]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    exact = np.quantile(means, [0.1, 0.9])
    found = bootstrap_interval(values, level=0.8, seed=5, resamples=200_000)
    assert found == pytest.approx(exact, abs=0.02)
    assert found != pytest.approx(np.quantile(values, [0.1, 0.9]), abs=0.2)


def test_bootstrap_agrees_with_scipy() -> None:
    """Another statistic, another library, other random numbers."""
    values = np.random.default_rng(11).gamma(1.7, 2.3, size=60)
    theirs = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    ours = bootstrap_interval(values, np.median, resamples=20_000)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Simulated coverage of a skewed mean."""
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(
            random.exponential(1.3, size=80), level=0.9, seed=trial, resamples=400
        )
        covered += low <= 1.3 <= high
    assert 0.83 <= covered / 300 <= 0.94


def test_bootstrap_is_a_function_of_the_seed_and_not_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are an implementation detail."""
    values = np.random.default_rng(3).normal(size=50)
    first = bootstrap_interval(values, seed=1, resamples=1000)
    assert bootstrap_interval(values, seed=1, resamples=1000) == first
    assert bootstrap_interval(values, seed=2, resamples=1000) != first
    monkeypatch.setattr("suasion.evaluate.statistics.BLOCK", 700)
    assert bootstrap_interval(values, seed=1, resamples=1000) == first


def test_win_rate_counts_ties_as_one_half() -> None:
    """Counted by hand, both ways round."""
    a = [0.3, 1.1, -2.0, 0.7, 0.7, 0.2, 0.9]
    b = [0.9, 1.0, -2.0, 1.4, 0.7, 0.3, 1.7]
    found = win_rate(a, b)
    assert (found.wins, found.losses, found.ties) == (4, 1, 2)
    assert found.rate == pytest.approx(5 / 7, rel=1e-12)
    assert found.low < found.rate < found.high
    # The rate belongs to the second model.
    assert win_rate(b, a).rate == pytest.approx(2 / 7, rel=1e-12)


def test_win_rate_interval_is_near_the_binomial_one() -> None:
    """Without ties the bootstrap is binomial."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=400), random.normal(0.4, 1, size=400)
    found = win_rate(a, b)
    assert (found.low, found.high) == pytest.approx(wilson_interval(found.wins, 400), abs=0.012)


@pytest.mark.parametrize(("b", "rate"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_win_rate_of_a_few_alike_prompts_is_not_certain(b: float, rate: float) -> None:
    """Eight of eight does not prove every one."""
    found = win_rate([0.0] * 8, [b] * 8)
    assert found.rate == rate
    assert found.high - found.low > 0.3
    assert found.low <= rate <= found.high


def test_pair_accuracy_does_not_count_ties() -> None:
    """Counted by hand; a dead head scores zero."""
    found = pair_accuracy([0.3, 0.4, 0.5, -0.1], [0.1, 0.4, 0.9, -0.7])
    assert (found.accuracy, found.pairs, found.ties) == (0.5, 4, 1)
    assert (found.low, found.high) == wilson_interval(2, 4)
    # A head that says nothing ranks no pair, where >= would make it perfect.
    assert pair_accuracy([0.7] * 5, [0.7] * 5).accuracy == 0.0


def test_longer_wins_counts_ties_as_one_half() -> None:
    """Counted by hand."""
    assert longer_wins([12, 7, 30, 5], [3, 7, 44, 1]) == 0.625
    assert longer_wins([1, 1], [1, 1]) == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(bad: float) -> None:
    """The message has the row."""
    with pytest.raises(DataError, match=r"scores_b\[1\]"):
        win_rate([0.1, 0.2, 0.3], [0.1, bad, 0.3])
    with pytest.raises(DataError, match=r"chosen\[0\]"):
        pair_accuracy([bad], [0.0])
    with pytest.raises(DataError, match=r"values\[2\]"):
        bootstrap_interval([0.0, 1.0, bad])


def test_what_cannot_be_measured_is_refused() -> None:
    """Nothing, unequal lengths, wrong shapes and levels."""
    with pytest.raises(DataError, match="scores_a"):
        win_rate([], [])
    with pytest.raises(DataError, match="2 rows"):
        longer_wins([1, 2], [1, 2, 3])
    with pytest.raises(DataError, match="shape"):
        bootstrap_interval(np.zeros((2, 2)))
    for hits, n in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(DataError, match="no interval"):
            wilson_interval(hits, n)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(DataError, match="level"):
            wilson_interval(1, 2, level=level)
