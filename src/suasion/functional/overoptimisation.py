"""How far optimising a proxy carries a policy, and what its true reward then looks like.

Gao et al. 2210.10760 fit true reward against d = sqrt(KL(policy || initial policy)).
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """KL of the best of n samples from a single sample, `log n - (n - 1) / n`, nats per answer.

    An upper bound, exact when no two answers score alike. Source: Stiennon et al. 2009.01325
    appendix G.3.

    Args:
        n: Samples to choose from.

    Returns:
        The KL.

    Raises:
        ValueError: There is no sample.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def gao_best_of_n(
    distance: Float[Tensor, "*shape"], *, alpha: float, beta: float
) -> Float[Tensor, "*shape"]:
    """True reward under best-of-n, `d (alpha - beta d)`, highest at `alpha / (2 beta)`.

    Source: Gao et al. 2210.10760 section 1.

    Args:
        distance: d, root of nats.
        alpha: Initial slope, score units per d.
        beta: How fast the slope falls.

    Returns:
        Gains in true reward over the initial policy.
    """
    return distance * (alpha - beta * distance)


def gao_rl(
    distance: Float[Tensor, "*shape"], *, alpha: float, beta: float
) -> Float[Tensor, "*shape"]:
    """True reward under reinforcement learning, `d (alpha - beta log d)`.

    Highest at `exp(alpha / beta - 1)`. Source: Gao et al. 2210.10760 section 1.

    Args:
        distance: d, root of nats; 0 gives 0, the limit.
        alpha: Slope at d = 1, score units per d.
        beta: How fast the slope falls with log d.

    Returns:
        Gains in true reward over the initial policy.
    """
    return distance * alpha - beta * distance.xlogy(distance)
