"""From a rollout to what the update trains on, by hand for a small case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from suasion.core.records import Rollout, TokenBatch, token_batch
from suasion.functional.advantages import gae
from suasion.models.references import FrozenReference
from suasion.models.roles import Policy, TrunkCritic, hidden_size_of
from suasion.rollout.experience import Experience, build_experience, token_budget

QUERIES = [[5, 9], [7, 8, 6]]
RESPONSES = [[20, 21], [22]]
GAMMA, LAM, BETA = 0.9, 0.8, 0.5


class Given:
    """A reference and a critic whose numbers are known."""

    on_trunk = False
    module: torch.nn.Module = torch.nn.Linear(1, 1)

    def __init__(self, numbers: dict[int, float]) -> None:
        self._numbers = numbers

    def present(self) -> AbstractContextManager[None]:
        """Nothing to fetch."""
        return nullcontext()

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """By target token."""
        return torch.tensor([self._numbers[int(token)] for token in batch.targets])

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """The same."""
        return self.logprobs(batch)


REFERENCE = Given({20: -1.5, 21: -0.25, 22: -2.0})
CRITIC = Given({20: 0.3, 21: -0.2, 22: 0.1})


def experience_of(
    policy: Policy,
    *,
    whiten: bool = False,
    batch_tokens: int = 100,
    kl_coef: float = BETA,
    **more: Any,
) -> Experience:
    """The small case."""
    logprobs = [torch.tensor([-1.0, -0.5]), torch.tensor([-2.5])]
    rollout = Rollout(QUERIES, RESPONSES, [True, False], logprobs, None)
    return build_experience(
        rollout,
        torch.tensor([1.0, -1.0]),
        policy=policy,
        reference=REFERENCE,
        critic=CRITIC,
        estimate=partial(gae, gamma=GAMMA, lam=LAM),
        kl_coef=kl_coef,
        whiten_advantages=whiten,
        pad_id=0,
        batch_tokens=batch_tokens,
        **more,
    )


@pytest.fixture
def policy(policies: Callable[[str], Policy]) -> Policy:
    """Any policy: its numbers are not used here."""
    return policies("gpt2")


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_a_small_case_by_hand(policy: Policy, batch_tokens: int) -> None:
    """k1 in the reward, the score on the last token, GAE backwards."""
    e = experience_of(policy, batch_tokens=batch_tokens)
    assert e.mask.tolist() == [[True, True], [True, False]]
    rewards = [-BETA * (-1.0 + 1.5), -BETA * (-0.5 + 0.25) + 1.0, -BETA * (-2.5 + 2.0) - 1.0]
    torch.testing.assert_close(e.rewards, torch.tensor([rewards[:2], [rewards[2], 0.0]]))
    last = rewards[1] - -0.2
    first = rewards[0] + GAMMA * -0.2 - 0.3 + GAMMA * LAM * last
    only = rewards[2] - 0.1
    torch.testing.assert_close(e.advantages, torch.tensor([[first, last], [only, 0.0]]))
    torch.testing.assert_close(
        e.returns, torch.tensor([[first + 0.3, last - 0.2], [only + 0.1, 0.0]])
    )
    torch.testing.assert_close(e.values, torch.tensor([[0.3, -0.2], [0.1, 0.0]]))


def test_whitening_is_over_all_tokens_that_count(policy: Policy) -> None:
    """Advantages only; returns stay as they are."""
    plain, white = experience_of(policy), experience_of(policy, whiten=True)
    assert torch.equal(plain.returns, white.returns)
    counted = white.advantages[white.mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6)
    assert float(counted.var(correction=0)) == pytest.approx(1, rel=0.6)
    ranks = plain.advantages[plain.mask].argsort()
    assert torch.equal(counted.argsort(), ranks)
    assert not white.advantages[~white.mask].any()


def test_rows_may_be_worked_on_anywhere(policy: Policy) -> None:
    """One after the other and last first: the same experience."""

    def elsewhere(count: int, work: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        found = {row: work([row])[0] for row in reversed(range(count))}
        return [found[row] for row in range(count)]

    here, there = experience_of(policy), experience_of(policy, each_row=elsewhere)
    for name in ("ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name


def test_a_rollout_comes_apart_and_together() -> None:
    """Row by row, with values and without."""
    logprobs = [torch.tensor([-1.0, -0.5]), torch.tensor([-2.5])]
    for values in (None, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]):
        whole = Rollout(QUERIES, RESPONSES, [True, False], logprobs, values, ["stop", "length"])
        parts = whole.split()
        assert [len(part) for part in parts] == [1, 1]
        assert Rollout.joined(parts) == whole


def test_a_penalty_in_the_loss_is_not_in_the_reward(policy: Policy) -> None:
    """The experience hands its weight on; the rewards are the scores."""
    e = experience_of(policy, kl_coef=0.0, loss_kl_coef=0.7)
    assert (e.kl_coef, e.loss_kl_coef) == (0.0, 0.7)
    torch.testing.assert_close(e.rewards, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))


def test_at_first_the_penalty_is_zero(policy: Policy) -> None:
    """A frozen copy of the policy holds it to itself: rewards are the scores alone."""
    batch = token_batch(QUERIES, RESPONSES, 0)
    flat = policy.logprobs(batch)[0].detach()
    rollout = Rollout(QUERIES, RESPONSES, [True, True], [flat[:2], flat[2:]], None)
    e = build_experience(
        rollout,
        torch.tensor([3.0, -2.0]),
        policy=policy,
        reference=FrozenReference.copy_of(policy),
        critic=TrunkCritic(hidden_size_of(policy)),
        estimate=gae,
        kl_coef=10.0,
        whiten_advantages=False,
        pad_id=0,
        batch_tokens=3,
    )
    torch.testing.assert_close(e.ref_logprobs, e.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        e.rewards, torch.tensor([[0.0, 3.0], [-2.0, 0.0]]), atol=1e-4, rtol=0
    )


def test_groups_stay_within_the_budget() -> None:
    """Every row once, the longest first, rows times longest at most the budget."""
    lengths = [5, 30, 7, 7, 12, 1, 100, 8]
    groups = list(token_budget(lengths, 30))
    assert sorted(row for group in groups for row in group) == list(range(8))
    assert groups[0] == [6]
    for group in groups[1:]:
        assert len(group) * max(lengths[row] for row in group) <= 30
    some = list(token_budget(lengths, 30, [1, 5, 7]))
    assert sorted(row for group in some for row in group) == [1, 5, 7]


def test_targets_are_the_response_tokens_in_order() -> None:
    """Row after row, whatever the padding."""
    batch = token_batch(QUERIES, RESPONSES, 21)
    assert batch.targets.tolist() == [20, 21, 22]
    assert batch.ids.tolist() == [[5, 9, 20, 21], [7, 8, 6, 22]]
    assert batch.predicts.sum().item() == 3
