"""Statistics of a PPO run, and the curves of over-optimisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import overoptimisation as over
from suasion.functional import statistics as stats

MASK = torch.tensor([True, True, True, True, False])


def doubles(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def test_distances_by_hand() -> None:
    """Three estimates of one distance, garbage at the end."""
    old = doubles(-1.0, -1.0, -1.0, -1.0, math.nan)
    new = old + doubles(0.2, -0.4, 0.0, 0.0, math.inf)
    assert stats.approx_kl_k2(new, old, MASK).item() == pytest.approx(0.2 / 8, rel=1e-9)
    assert stats.policy_kl(new, old, MASK).item() == pytest.approx(0.2 / 4, rel=1e-9)
    k3 = (math.expm1(0.2) - 0.2 + math.expm1(-0.4) + 0.4) / 4
    assert stats.approx_kl_k3(new, old, MASK).item() == pytest.approx(k3, rel=1e-9)


def test_two_clip_fractions() -> None:
    """Ratios outside the band count only where the advantage pushes them further out."""
    old = torch.zeros(5, dtype=torch.float64)
    new = doubles(0.5, 1.5, 0.5, 1.05, 7.0).log()
    a = doubles(1.0, 1.0, -1.0, 1.0, 1.0)
    assert stats.clip_fraction(new, old, a, MASK) == 0.5
    assert stats.ratio_outside_fraction(new, old, MASK) == 0.75
    wide = {"clip_low": 0.6, "clip_high": 0.2}
    assert stats.clip_fraction(new, old, a, MASK, **wide) == 0.25
    assert stats.ratio_outside_fraction(new, old, MASK, **wide) == 0.25
    high = {"clip_low": 0.2, "clip_high": 0.6}
    assert stats.clip_fraction(new, old, a, MASK, **high) == 0.25
    assert stats.ratio_outside_fraction(new, old, MASK, **high) == 0.5
    narrow = {"clip_low": 0.2, "clip_high": 0.04}
    assert stats.ratio_outside_fraction(new, old, MASK, **narrow) == 1.0
    near = doubles(0.81, 0.79, 1.19, 1.21, 1.0).log()
    assert stats.ratio_outside_fraction(near, old, MASK) == 0.5
    assert stats.clip_fraction(near, old, doubles(-1, -1, 1, 1, 1), MASK) == 0.5
    assert stats.ratio_outside_fraction(old, old, MASK, clip_low=0.0, clip_high=0.0) == 0.0


@given(
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
)
def test_cut_tokens_are_outside_tokens(gaps: list[float], advantages: list[float]) -> None:
    """The first fraction never exceeds the second; the k3 distance is never negative."""
    old = torch.full((5,), -1.0, dtype=torch.float64)
    new, a = old + doubles(*gaps), doubles(*advantages)
    assert stats.clip_fraction(new, old, a, MASK) <= stats.ratio_outside_fraction(new, old, MASK)
    assert stats.approx_kl_k3(new, old, MASK) >= 0
    assert stats.approx_kl_k2(new, old, MASK) >= 0


def test_value_clip_fraction_by_hand() -> None:
    """Counts where the held value is further from its target, not merely held."""
    values, old = doubles(1.0, 1.0, 0.15, -1.0, math.nan), doubles(0.0, 0.0, 0.0, 0.0, 0.0)
    returns = doubles(2.0, -2.0, 2.0, -2.0, 0.0)
    assert stats.value_clip_fraction(values, old, returns, MASK) == 0.5
    assert stats.value_clip_fraction(values, old, returns, MASK, clip=0.05) == 0.75
    assert stats.value_clip_fraction(values, old, returns, MASK, clip=2.0) == 0.0


def test_explained_variance_by_hand() -> None:
    """Perfect, constant, wrong by a constant, and returns that do not vary."""
    returns = doubles(1.0, 2.0, 3.0, 6.0, math.nan)
    flat = torch.full((5,), 3.0, dtype=torch.float64)
    for centred in (True, False):
        check = {"centred": centred}
        assert stats.explained_variance(returns, returns, MASK, **check) == 1.0
        assert stats.explained_variance(flat, returns, MASK, **check) == 0.0
        assert stats.explained_variance(returns, flat, MASK, **check).isnan()
    assert stats.explained_variance(returns + 1, returns, MASK) == 1.0
    lower = stats.explained_variance(returns + 1, returns, MASK, centred=False)
    assert lower.item() == pytest.approx(1 - 1 / 3.5, rel=1e-12)
    assert stats.explained_variance(-returns, returns, MASK).item() == pytest.approx(
        -3.0, rel=1e-12
    )


def test_a_tie_is_a_miss() -> None:
    """One right, one tied, one wrong, one right."""
    got = stats.pairwise_accuracy(doubles(1.0, 1.0, 1.0, 5.0), doubles(0.0, 1.0, 2.0, 4.0))
    assert got == 0.5
    with pytest.raises(ValueError, match="empty"):
        stats.pairwise_accuracy(doubles(), doubles())


def test_statistics_carry_no_gradient() -> None:
    """They can be logged without holding a graph."""
    x = doubles(0.1, 0.2, 0.3, 0.4, 0.5).requires_grad_()
    y = doubles(0.3, 0.1, 0.3, 0.0, 0.5)
    results = [
        stats.approx_kl_k2(x, y, MASK),
        stats.approx_kl_k3(x, y, MASK),
        stats.policy_kl(x, y, MASK),
        stats.clip_fraction(x, y, y, MASK),
        stats.ratio_outside_fraction(x, y, MASK),
        stats.value_clip_fraction(x, y, y, MASK),
        stats.explained_variance(x, y, MASK),
        stats.pairwise_accuracy(x, y),
    ]
    assert not any(result.requires_grad for result in results)
    assert {result.dtype for result in results} == {torch.float64}, "no precision is lost"


def test_best_of_n_distance_is_the_kl_of_the_best() -> None:
    """Exact on ten equally likely answers: the rank of the best of three, against uniform."""
    answers, n = 2000, 3
    probs = [((k + 1) / answers) ** n - (k / answers) ** n for k in range(answers)]
    kl = math.fsum(p * math.log(p * answers) for p in probs)
    assert over.best_of_n_kl(n) == pytest.approx(kl, rel=1e-4)
    assert over.best_of_n_kl(1) == 0.0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        over.best_of_n_kl(0)


def test_curves_peak_where_calculus_says() -> None:
    """At alpha / 2 beta and exp(alpha / beta - 1); both start at zero."""
    shape = {"alpha": 1.2, "beta": 0.5}
    for curve, peak in ((over.gao_best_of_n, 1.2), (over.gao_rl, math.exp(1.4))):
        around = curve(doubles(0.0, peak - 0.1, peak, peak + 0.1), **shape)
        assert around[0] == 0.0
        assert around.argmax() == 2
        at = doubles(peak).requires_grad_()
        assert abs(torch.autograd.grad(curve(at, **shape).sum(), at)[0]) < 1e-12
