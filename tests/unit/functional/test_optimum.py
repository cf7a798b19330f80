"""PPO, put together from these functions, finds the optimum that is known in closed form.

Two tokens out of three each; the objective is E[reward] - BETA KL(policy || reference), whose
maximum is BETA log Z (Ziegler et al. 1909.08593 eq. 2, Rafailov et al. 2305.18290 eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from suasion.functional import kl
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.functional.masking import masked_mean, whiten
from suasion.functional.rewards import token_rewards

BETA = 0.5
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SECOND = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64)
REWARD = torch.tensor([[1.0, 0.2, -1.0], [0.0, 2.0, 0.5], [0.4, -0.2, 1.5]], dtype=torch.float64)
REFERENCE = FIRST[:, None] * SECOND
BEST = BETA * (REFERENCE * (REWARD / BETA).exp()).sum().log().item()


def objective(first: Tensor, second: Tensor) -> float:
    """Exact objective of a policy given by its logits."""
    probs = first.softmax(0)[:, None] * second.softmax(1)
    return float((probs * (REWARD - BETA * (probs / REFERENCE).log())).sum())


def train(penalty: Callable[[Tensor, Tensor], Tensor], *, iterations: int = 120) -> float:
    """Sample, reward, estimate advantages, take four clipped steps; the objective at the end."""
    rng = torch.Generator().manual_seed(11)
    first, second = FIRST.log().requires_grad_(), SECOND.log().requires_grad_()
    value_first, value_second = (torch.zeros(n).double().requires_grad_() for n in (1, 3))
    policy_table = [first, second]
    critic_table = [value_first, value_second]
    optimizer = torch.optim.Adam([*policy_table, *critic_table], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=iterations)
    mask = torch.ones(512, 2).bool()

    def logprobs(a: Tensor, b: Tensor, tables: list[Tensor]) -> Tensor:
        one, two = tables[0].log_softmax(0), tables[1].log_softmax(1)
        return torch.stack([one[a], two[a, b]], dim=1)

    for _ in range(iterations):
        with torch.no_grad():
            a = torch.multinomial(first.softmax(0), 512, replacement=True, generator=rng)
            b = torch.multinomial(second.softmax(1)[a], 1, generator=rng).squeeze(1)
            old = logprobs(a, b, policy_table)
            reference = logprobs(a, b, [FIRST.log(), SECOND.log()])
            values = torch.stack([value_first.expand(512), value_second[a]], dim=1)
            rewards = token_rewards(REWARD[a, b], penalty(old, reference), mask, kl_coef=BETA)
            advantages, returns = gae(rewards, values, mask)
            advantages = whiten(advantages, mask)
        for _ in range(4):
            new = logprobs(a, b, policy_table)
            now = torch.stack([value_first.expand(512), value_second[a]], dim=1)
            policy = clipped_surrogate(new, old, advantages)
            critic = clipped_value_loss(now, values, returns, clip=None)
            optimizer.zero_grad()
            masked_mean(policy + critic, mask).backward()
            optimizer.step()
        schedule.step()
    return objective(first.detach(), second.detach())


def test_k1_in_the_reward_reaches_the_optimum() -> None:
    """Within 0.005 of BETA log Z, and never above it."""
    assert BEST - 0.005 < train(kl.k1) <= BEST + 1e-9


@pytest.mark.parametrize("penalty", [kl.k3, kl.absolute_difference])
def test_other_estimators_in_the_reward_do_not(
    penalty: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Negative control: they end elsewhere, far below."""
    assert train(penalty, iterations=60) < BEST - 0.05
