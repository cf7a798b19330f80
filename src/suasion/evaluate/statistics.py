"""How sure a measured share is: intervals, win rates, pair accuracy.

Everything here takes plain numbers and returns plain numbers; a figure is never returned without
the interval or the tie count one needs to read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from suasion.core.errors import DataError
from suasion.core.seeding import seed_of

Numbers = Sequence[float] | NDArray[np.floating] | NDArray[np.integer]
"""Scores or lengths, one per prompt or pair."""

BLOCK = 4_000_000
"""Most resampled values held in memory at once (32 MB of float64)."""


class Statistic(Protocol):
    """A statistic that can be taken along one axis: `np.mean`, `np.median`, ..."""

    def __call__(self, values: NDArray[np.float64], /, *, axis: int) -> NDArray[np.float64]:
        """Reduce `axis` of `values`."""
        ...


class Interval(NamedTuple):
    """A confidence interval, in the unit of the figure it belongs to."""

    low: float
    high: float


class WinRate(NamedTuple):
    """How often one model beats another on the same prompts."""

    rate: float
    """Share won by the second model, a tie counting one half; in [0, 1]."""
    low: float
    """Lower end of the interval of `rate`."""
    high: float
    """Upper end of the interval of `rate`."""
    wins: int
    """Prompts the second model won."""
    losses: int
    """Prompts the first model won."""
    ties: int
    """Prompts with equal scores."""


class PairAccuracy(NamedTuple):
    """How often a reward model puts the chosen answer strictly above the rejected one."""

    accuracy: float
    """Share of pairs ranked right, in [0, 1]; a tie is not right."""
    low: float
    """Lower end of the Wilson interval of `accuracy`."""
    high: float
    """Upper end of the Wilson interval of `accuracy`."""
    pairs: int
    """Pairs judged."""
    ties: int
    """Pairs with equal scores. Many of them mean a reward head that says nothing."""


def wilson_interval(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """Score interval of a binomial share; unlike the normal one it stays honest near 0 and 1.

    The two shares p at which `|successes / n - p| = z sqrt(p (1 - p) / n)`.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927); recommended in Brown, Cai, DasGupta, doi:10.1214/ss/1009213286, section 4.

    Args:
        successes: How many of `n`; a fraction is allowed, for ties that count one half.
        n: Trials, at least 1.
        level: Coverage asked for, in (0, 1).

    Raises:
        DataError: `n` is below 1, `successes` is outside 0..n, or `level` is outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(
            f"no interval for {successes} successes of {n}", "give 1 or more trials and 0..n hits"
        )
    z = _quantile(level)
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n one end is exactly 0 or 1; rounding would leave it a hair outside the share.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def bootstrap_interval(
    values: Numbers,
    statistic: Statistic = np.mean,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap interval of a statistic of independent values.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3. The
    percentile form is used because it never leaves the range of the values.

    Args:
        values: One value per independent unit (prompt, pair), shape (N,).
        statistic: Reduces one axis; called on blocks of shape (resamples in block, N).
        level: Coverage asked for, in (0, 1).
        seed: The same seed gives the same interval, whatever else drew random numbers.
        resamples: How many times to draw N values with replacement.

    Raises:
        DataError: no values, a value that is not finite, or a `level` outside (0, 1).
    """
    _quantile(level)
    sample = _finite(values, "values")
    random = np.random.default_rng(seed_of(seed, "bootstrap"))
    rows = max(1, min(resamples, BLOCK // len(sample)))
    drawn: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        picks = random.integers(0, len(sample), size=(count, len(sample)))
        drawn.append(np.asarray(statistic(sample[picks], axis=-1)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Interval(float(low), float(high))


def win_rate(
    scores_a: Numbers,
    scores_b: Numbers,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> WinRate:
    """Share of prompts on which `b` beats `a`, a tie counting one half, with its interval.

    The interval is a bootstrap over prompts. Where every prompt went the same way a bootstrap has
    no spread and would claim certainty from a handful of prompts; there the Wilson interval of
    the same share is given.

    Args:
        scores_a: Scores of the first model (the one before), shape (N,).
        scores_b: Scores of the second model (the one after) on the same prompts, shape (N,).
        level: Coverage asked for, in (0, 1).
        seed: See `bootstrap_interval`.
        resamples: See `bootstrap_interval`.

    Raises:
        DataError: nothing to compare, different lengths, or a score that is not finite.
    """
    a, b = _paired(scores_a, scores_b, "scores_a", "scores_b")
    outcomes = _outcomes(a, b)
    rate = float(outcomes.mean())
    if (outcomes == outcomes[0]).all():
        low, high = wilson_interval(float(outcomes.sum()), len(outcomes), level=level)
    else:
        low, high = bootstrap_interval(outcomes, level=level, seed=seed, resamples=resamples)
    return WinRate(rate, low, high, int((b > a).sum()), int((b < a).sum()), int((a == b).sum()))


def pair_accuracy(chosen: Numbers, rejected: Numbers, *, level: float = 0.95) -> PairAccuracy:
    """Share of pairs whose chosen answer scores strictly higher, with its Wilson interval.

    Args:
        chosen: Scores of the preferred answers, shape (N,).
        rejected: Scores of the other answers, shape (N,).
        level: Coverage asked for, in (0, 1).

    Raises:
        DataError: no pairs, different lengths, or a score that is not finite.
    """
    better, worse = _paired(chosen, rejected, "chosen", "rejected")
    right = int((better > worse).sum())
    low, high = wilson_interval(right, len(better), level=level)
    ties = int((better == worse).sum())
    return PairAccuracy(right / len(better), low, high, len(better), ties)


def longer_wins(chosen_lengths: Numbers, rejected_lengths: Numbers) -> float:
    """Pair accuracy of always preferring the longer answer, a tie counting one half.

    A reward model that does not beat this figure may have learned nothing but length; see
    Singhal et al., "A Long Way to Go", arXiv:2310.03716, section 3.

    Args:
        chosen_lengths: Lengths of the preferred answers, shape (N,); any unit, the same in both.
        rejected_lengths: Lengths of the other answers, shape (N,).

    Raises:
        DataError: no pairs, different numbers of them, or a length that is not finite.
    """
    better, worse = _paired(chosen_lengths, rejected_lengths, "chosen_lengths", "rejected_lengths")
    return float(_outcomes(worse, better).mean())


def _outcomes(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where `b` is larger, 0 where `a` is, one half where they tie."""
    return (b > a) + 0.5 * (a == b)


def _quantile(level: float) -> float:
    """Standard deviations that a two-sided normal interval of coverage `level` reaches."""
    if not 0 < level < 1:
        raise DataError(f"a confidence level of {level}", "give one between 0 and 1, such as 0.95")
    return float(ndtri((1 + level) / 2))


def _finite(values: Numbers, name: str) -> NDArray[np.float64]:
    """`values` as a float64 vector, checked."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise DataError(f"{name} has shape {vector.shape}", "give one or more numbers in a row")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise DataError(
            f"{name}[{bad[0]}] is {vector[bad[0]]} ({len(bad)} of {len(vector)} are not finite)",
            "find out where the scorer overflowed; leaving such rows out would bias the figure",
        )
    return vector


def _paired(
    first: Numbers, second: Numbers, first_name: str, second_name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both vectors, checked to be finite and of one length."""
    left, right = _finite(first, first_name), _finite(second, second_name)
    if len(left) != len(right):
        raise DataError(
            f"{first_name} has {len(left)} rows, {second_name} has {len(right)}",
            "give both for the same prompts in the same order",
        )
    return left, right
