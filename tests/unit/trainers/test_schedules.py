"""Learning rates over the iterations, at points known in closed form."""

from __future__ import annotations

import math

import pytest

from suasion.trainers.schedules import constant, cosine, linear


def test_they_end_at_zero_without_options() -> None:
    """After the last iteration; the first one trains at the peak."""
    assert [constant(step, steps=4) for step in range(6)] == [1.0] * 6
    assert [linear(step, steps=4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    found = [cosine(step, steps=3) for step in range(5)]
    assert found == pytest.approx([1.0, 0.75, 0.25, 0.0, 0.0], abs=1e-12)


def test_warmup_rises_and_never_trains_at_zero() -> None:
    """By equal steps, to the peak in the first iteration after it."""
    assert [constant(step, steps=9, warmup=3) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    rising = [linear(step, steps=7, warmup=3) for step in range(8)]
    assert rising == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_floor_is_where_they_end() -> None:
    """As a share of the peak."""
    assert linear(5, steps=5, floor=0.1) == pytest.approx(0.1)
    assert linear(1, steps=2, floor=0.2) == pytest.approx(0.6)
    assert cosine(9, steps=9, floor=0.3) == pytest.approx(0.3)
    halfway = 0.3 + 0.7 * (1 + math.cos(math.pi / 3)) / 2
    assert cosine(3, steps=9, floor=0.3) == pytest.approx(halfway)


@pytest.mark.parametrize("warmup", [-1, 4, 0.5])
def test_a_warmup_outside_the_run_is_refused(warmup: int) -> None:
    """Or one that is no number of iterations."""
    for schedule in (constant, linear, cosine):
        with pytest.raises(ValueError, match=r"whole number in 0\.\.3"):
            schedule(0, steps=4, warmup=warmup)


@pytest.mark.parametrize("floor", [-0.1, 1.1])
def test_a_floor_that_is_no_share_is_refused(floor: float) -> None:
    """Below 0 or above 1."""
    for schedule in (linear, cosine):
        with pytest.raises(ValueError, match="share"):
            schedule(0, steps=4, floor=floor)
