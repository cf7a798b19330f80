"""How a learning rate moves over the iterations of a policy run: pure functions of the iteration.

Each gives the share of the peak rate that iteration `step`, counted from zero, trains with.
"""

from __future__ import annotations

import math


def constant(step: int, *, steps: int, warmup: int = 0) -> float:
    """The peak rate, from the end of the warm-up on.

    Args:
        step: The iteration, from zero.
        steps: Iterations of the run.
        warmup: First iterations, over which the rate rises; none of them trains at zero.

    Returns:
        A share of the peak rate.

    Raises:
        ValueError: the warm-up is not within the run.
    """
    return min(_risen(step, steps, warmup), 1.0)


def linear(step: int, *, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """From the peak rate to `floor` of it in a straight line.

    Args:
        step: The iteration, from zero.
        steps: Iterations of the run; after the last one the rate is `floor`.
        warmup: First iterations, over which the rate rises.
        floor: Share of the peak rate to end at.

    Returns:
        A share of the peak rate.

    Raises:
        ValueError: the warm-up is not within the run, or the floor is no share.
    """
    return min(_risen(step, steps, warmup), _between(floor, 1.0 - _done(step, steps, warmup)))


def cosine(step: int, *, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """From the peak rate to `floor` of it along half a cosine (arXiv 1608.03983, eq. 5).

    Args:
        step: The iteration, from zero.
        steps: Iterations of the run; after the last one the rate is `floor`.
        warmup: First iterations, over which the rate rises.
        floor: Share of the peak rate to end at.

    Returns:
        A share of the peak rate.

    Raises:
        ValueError: the warm-up is not within the run, or the floor is no share.
    """
    risen = _risen(step, steps, warmup)
    left = 0.5 * (1.0 + math.cos(math.pi * _done(step, steps, warmup)))
    return min(risen, _between(floor, left))


def _risen(step: int, steps: int, warmup: int) -> float:
    """Share that the warm-up allows; 1 and more when it is over."""
    if not (isinstance(warmup, int) and 0 <= warmup < steps):
        raise ValueError(f"warmup must be a whole number in 0..{steps - 1}, got {warmup}")
    return (step + 1) / (warmup + 1)


def _done(step: int, steps: int, warmup: int) -> float:
    """Part of the run after the warm-up that is over."""
    return min(max(step - warmup, 0) / (steps - warmup), 1.0)


def _between(floor: float, left: float) -> float:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be a share of the learning rate, 0..1, got {floor}")
    return floor + (1.0 - floor) * left
