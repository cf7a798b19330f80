"""GAE and the critic-free advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import advantages as adv

HOLES = torch.tensor([[True, True, False, True], [False, True, True, False]])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards and values."""
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 2, 4, generator=rng, dtype=torch.float64)
    return rewards, values


def test_published_numbers() -> None:
    """NVIDIA/NeMo-Aligner@af2b3bd9 nemo_aligner/utils/tests/ppo_utils_test.py."""
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    mask = torch.ones(1, 4).bool()
    got, _ = adv.gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert got.tolist() == [[0.5, 0.0, 0.5, -3.0]]
    scores = torch.tensor([[1.0, 0.0, -3.0, 5.0], [2.0, 7.0, -1.0, 0.0]])
    admitted = torch.tensor([[True] * 4, [True, True, True, False]])
    wanted = [[2 / 3, 1.0, 2.0, -2 / 3], [3.0, 0.5, 4.5, 8 / 3]]
    got = adv.leave_one_out_baseline(scores, admitted)
    torch.testing.assert_close(got, torch.tensor(wanted))


def test_telescoping_at_lambda_one() -> None:
    """With gamma and lambda one an advantage is the rewards to go less the value."""
    rewards, values = batch()
    got, returns = adv.gae(rewards, values, HOLES, lam=1.0)
    to_go = adv.rewards_to_go(rewards, HOLES)
    wanted = torch.where(HOLES, to_go - values, torch.zeros_like(values))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, to_go, rtol=1e-12, atol=1e-12)
    by_hand = rewards[0, 0] + rewards[0, 1] + rewards[0, 3]
    assert to_go[0, 0].item() == pytest.approx(by_hand.item(), rel=1e-12)
    discounted = adv.rewards_to_go(rewards, HOLES, gamma=0.5)[0, 0]
    by_hand = rewards[0, 0] + 0.5 * rewards[0, 1] + 0.25 * rewards[0, 3]
    assert discounted.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_controls_lambda_gamma_and_bootstrap_matter() -> None:
    """Negative controls: each constant changes the result, and the defaults are 1 and 0.95."""
    rewards, values = batch()
    base = adv.gae(rewards, values, HOLES)
    same = adv.gae(
        rewards,
        values,
        HOLES,
        gamma=1.0,
        lam=0.95,
        lam_critic=0.95,
        bootstrap=torch.zeros(2).double(),
    )
    for a, b in zip(base, same, strict=True):
        assert torch.equal(a, b)
    for change in ({"lam": 0.5}, {"gamma": 0.9}, {"bootstrap": torch.ones(2).double()}):
        assert not torch.allclose(adv.gae(rewards, values, HOLES, **change)[0], base[0])
    other = adv.gae(rewards, values, HOLES, lam_critic=1.0)
    assert torch.equal(other[0], base[0])
    assert torch.equal(other[1], adv.gae(rewards, values, HOLES, lam=1.0)[1])


def test_lambda_per_row() -> None:
    """One lambda a row equals running the rows apart."""
    rewards, values = batch()
    lam = torch.tensor([0.3, 0.9], dtype=torch.float64)
    together = adv.gae(rewards, values, HOLES, lam=lam)
    for row in range(2):
        part = slice(row, row + 1)
        alone = adv.gae(rewards[part], values[part], HOLES[part], lam=lam[row].item())
        assert torch.equal(together[0][part], alone[0])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e300])
def test_what_the_policy_did_not_choose_is_never_read(garbage: float) -> None:
    """Padding, holes and their gradient."""
    rewards, values = batch()
    clean = adv.gae(rewards, values, HOLES)
    dirty = [torch.where(HOLES, x, garbage).requires_grad_() for x in (rewards, values)]
    got = adv.gae(dirty[0], dirty[1], HOLES)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)
        assert (a[~HOLES] == 0).all()
    grads = torch.autograd.grad(got[0].square().sum() + got[1].sum(), dirty)
    for grad in grads:
        assert (grad[~HOLES] == 0).all()
        assert grad.isfinite().all()
    assert (adv.rewards_to_go(dirty[0], HOLES)[~HOLES] == 0).all()


def test_padding_left_and_right_changes_nothing() -> None:
    """The same answer at another place in the row."""
    rewards, values = batch()
    plain = adv.gae(rewards, values, torch.ones(2, 4).bool())
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    mask = torch.tensor([[False] * 2 + [True] * 4 + [False] * 2] * 2)
    wide = [torch.cat([zeros, x, zeros], dim=1) for x in (rewards, values)]
    padded = adv.gae(wide[0], wide[1], mask)
    for a, b in zip(padded, plain, strict=True):
        assert torch.equal(a[:, 2:-2], b)


def test_adaptive_lambda_of_short_answers() -> None:
    """It is never negative, and grows with the answer."""
    lengths = torch.tensor([1, 10, 20, 40, 400])
    assert adv.length_adaptive_lam(lengths).tolist() == pytest.approx([0, 0, 0, 0.5, 0.95])
    assert adv.length_adaptive_lam(lengths, alpha=0.5)[1].item() == pytest.approx(0.8)


def test_per_token_and_reinforce_plus_plus() -> None:
    """An answer's advantage at each of its tokens; whitened returns over counted tokens."""
    spread = adv.per_token(torch.tensor([2.0, -1.0]), HOLES)
    assert spread.tolist() == [[2.0, 2.0, 0.0, 2.0], [0.0, -1.0, -1.0, 0.0]]
    rewards, _ = batch()
    got = adv.reinforce_plus_plus(rewards, HOLES)
    kept = got[HOLES]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.var(correction=0).item() == pytest.approx(1.0, rel=1e-6)
    assert (got[~HOLES] == 0).all()
    order = adv.rewards_to_go(rewards, HOLES)[HOLES].argsort()
    assert torch.equal(kept.argsort(), order)
    unbiased = adv.reinforce_plus_plus(rewards, HOLES, ddof=1)[HOLES]
    assert unbiased.var(correction=1).item() == pytest.approx(1.0, rel=1e-6)
    small = adv.reinforce_plus_plus(rewards * 1e-4, HOLES)[HOLES]
    exact = adv.reinforce_plus_plus(rewards * 1e-4, HOLES, eps=0.0)[HOLES]
    returns = adv.rewards_to_go(rewards * 1e-4, HOLES)[HOLES]
    variance = returns.var(correction=0)
    torch.testing.assert_close(small, exact * (variance / (variance + 1e-8)).sqrt())
    assert not torch.allclose(adv.reinforce_plus_plus(rewards, HOLES, gamma=0.5)[HOLES], kept)


def test_one_name_three_numbers() -> None:
    """Rewards [1, 0, 0, 0] under the constants that go by the name of GRPO."""
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert adv.group_relative(scores, ddof=0, eps=1e-4)[0, 0].item() == pytest.approx(
        1.7317, abs=5e-4
    )
    assert adv.group_relative(scores)[0, 0].item() == pytest.approx(1.4997, abs=5e-5)
    assert adv.group_relative(scores, eps=1e-9)[0, 0].item() == pytest.approx(1.5, abs=5e-9)


def test_batch_scaling_by_hand() -> None:
    """Scores 0, 2 and 4, 6: group-centred at -1, 1 with a batch variance of 20/3 or 5."""
    scores = torch.tensor([[0.0, 2.0], [4.0, 6.0]], dtype=torch.float64)
    for ddof, variance in ((0, 5.0), (1, 20 / 3)):
        wanted = 1 / (math.sqrt(variance) + 0.5)
        got = adv.group_centred_batch_scaled(scores, ddof=ddof, eps=0.5)
        assert got.flatten().tolist() == pytest.approx([-wanted, wanted] * 2, rel=1e-12)
        wanted = 3 / (math.sqrt(variance) + 0.5)
        assert adv.batch_standardised(scores, ddof=ddof, eps=0.5)[1, 1].item() == pytest.approx(
            wanted
        )


groups = st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.floats(-50, 50), min_size=k, max_size=k), min_size=1, max_size=4)
)


@given(groups, st.floats(-20, 20))
def test_group_advantages_ignore_how_hard_a_prompt_is(
    rows: list[list[float]], shift: float
) -> None:
    """A constant added to one prompt's scores changes nothing; rows sum to zero."""
    scores = torch.tensor(rows, dtype=torch.float64)
    moved = scores.clone()
    moved[0] += shift
    k = scores.shape[1]
    for function in (
        adv.leave_one_out,
        adv.group_centred,
        lambda s: adv.group_relative(s, eps=1.0),
    ):
        got = function(scores)
        torch.testing.assert_close(function(moved), got, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            got.sum(dim=1), torch.zeros(len(rows)).double(), rtol=0, atol=1e-7
        )
    torch.testing.assert_close(
        adv.leave_one_out(scores), adv.group_centred(scores) * k / (k - 1), rtol=1e-9, atol=1e-9
    )


def test_equal_scores_say_nothing() -> None:
    """Zeros, not NaN."""
    scores = torch.full((2, 3), 0.5, dtype=torch.float64)
    for function in (adv.leave_one_out, adv.group_relative, adv.group_centred_batch_scaled):
        assert function(scores).tolist() == [[0.0] * 3] * 2


def test_too_few_answers_are_refused() -> None:
    """One answer has no other, and no standard deviation."""
    one = torch.tensor([[1.0]])
    for function in (adv.leave_one_out, adv.group_relative, adv.group_centred_batch_scaled):
        with pytest.raises(ValueError, match="answers"):
            function(one)
    with pytest.raises(ValueError, match="over 1 answers, got 1"):
        adv.batch_standardised(one)
    assert adv.group_relative(one, ddof=0).tolist() == [[0.0]]
    assert adv.group_centred_batch_scaled(one, ddof=0).tolist() == [[0.0]]
    assert adv.batch_standardised(one, ddof=0).tolist() == [[0.0]]
    two = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert adv.leave_one_out(two).tolist() == [[-2.0, 2.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="two admitted"):
        adv.leave_one_out_baseline(two, torch.tensor([[True, True], [True, False]]))


def test_answers_left_out_of_baselines_may_be_garbage() -> None:
    """A NaN score that is not admitted reaches no other answer."""
    scores = torch.tensor([[1.0, math.nan, 4.0]])
    got = adv.leave_one_out_baseline(scores, torch.tensor([[True, False, True]]))
    assert got.tolist() == [[4.0, 2.5, 1.0]]
