"""The formulas of suasion.functional once more, in plain loops over floats.

Written from the papers without torch and without looking at the vectorised code, so that a shared
mistake is unlikely. Gradients are derived by hand and checked by central differences in
`regenerate.py`.
"""

from __future__ import annotations

import math

Vec = list[float]
Mat = list[list[float]]


def counted(x: Mat, mask: Mat) -> Vec:
    """Elements where the mask is one, in reading order."""
    return [
        v for row, marks in zip(x, mask, strict=True) for v, m in zip(row, marks, strict=True) if m
    ]


def mean(values: Vec) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def variance(values: Vec, ddof: int) -> float:
    """Two-pass variance."""
    centre = mean(values)
    return math.fsum((v - centre) ** 2 for v in values) / (len(values) - ddof)


def whiten(
    x: Mat, mask: Mat, ddof: int, eps: float, *, keep_mean: bool
) -> list[list[float | None]]:
    """Whitened values, None where nothing counts."""
    kept = counted(x, mask)
    centre, spread = mean(kept), variance(kept, ddof)
    back = centre if keep_mean else 0.0
    return [
        [
            (v - centre) / math.sqrt(spread + eps) + back if m else None
            for v, m in zip(*rows, strict=True)
        ]
        for rows in zip(x, mask, strict=True)
    ]


def softmax(logits: Vec, temperature: float = 1.0) -> Vec:
    """Probabilities."""
    top = max(logits)
    weights = [math.exp((v - top) / temperature) for v in logits]
    return [w / math.fsum(weights) for w in weights]


def entropy(probs: Vec) -> float:
    """Entropy in nats."""
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def gae(rewards: Vec, values: Vec, gamma: float, lam: float, bootstrap: float) -> Vec:
    """Advantages by the forward double sum of 1506.02438 eq. 16."""
    following = [*values[1:], bootstrap]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
    n = len(deltas)
    return [math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


def gae_rows(
    rewards: Mat, values: Mat, mask: Mat, gamma: float, lam: float, bootstrap: Vec
) -> tuple[Mat, Mat]:
    """GAE on the counted tokens of each row, put back in place; advantages and returns."""
    out_a, out_r = [], []
    for r, v, m, last in zip(rewards, values, mask, bootstrap, strict=True):
        places = [i for i, keep in enumerate(m) if keep]
        short = gae([r[i] for i in places], [v[i] for i in places], gamma, lam, last)
        row_a, row_r = [0.0] * len(m), [0.0] * len(m)
        for i, a in zip(places, short, strict=True):
            row_a[i], row_r[i] = a, a + v[i]
        out_a.append(row_a)
        out_r.append(row_r)
    return out_a, out_r


def clip(x: float, low: float, high: float) -> float:
    """The nearest number to x in [low, high]."""
    return max(low, min(x, high))


def surrogate(
    new: float, old: float, adv: float, low: float, high: float, dual: float | None
) -> float:
    """PPO's clipped loss of one token."""
    ratio = math.exp(new - old)
    loss = max(-adv * ratio, -adv * clip(ratio, 1 - low, 1 + high))
    return min(loss, -adv * dual) if dual is not None and adv < 0 else loss


def surrogate_slope(
    new: float, old: float, adv: float, low: float, high: float, dual: float | None
) -> float:
    """Derivative of `surrogate` by `new`: -A r where the ratio is followed, else 0."""
    ratio = math.exp(new - old)
    if adv > 0 and ratio > 1 + high:
        return 0.0
    if adv < 0 and (ratio < 1 - low or (dual is not None and ratio > dual)):
        return 0.0
    return -adv * ratio


def value_loss(value: float, old: float, target: float, eps: float) -> float:
    """Half the larger squared error."""
    held = clip(value, old - eps, old + eps)
    return 0.5 * max((value - target) ** 2, (held - target) ** 2)


def value_slope(value: float, old: float, target: float, eps: float) -> float:
    """Derivative of `value_loss` by the value."""
    held = clip(value, old - eps, old + eps)
    return value - target if (value - target) ** 2 >= (held - target) ** 2 else 0.0


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def optimum(ref: Vec, rewards: Vec, beta: float) -> tuple[Vec, float]:
    """The distribution best for reward - beta KL, and beta log Z."""
    weights = [p * math.exp(r / beta) for p, r in zip(ref, rewards, strict=True)]
    total = math.fsum(weights)
    return [w / total for w in weights], beta * math.log(total)
