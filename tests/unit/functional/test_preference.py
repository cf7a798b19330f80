"""Losses on preferences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import preference as pref

small = st.floats(-20, 20)


def doubles(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def test_pairwise_by_hand() -> None:
    """A tie costs log 2; margins move it; centring pulls on the sum of the scores."""
    tie = doubles(0.5)
    assert pref.pairwise_loss(tie, tie).item() == pytest.approx(math.log(2), rel=1e-12)
    won = pref.pairwise_loss(doubles(2.0), doubles(1.0))
    assert won.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)
    margin = pref.pairwise_loss(doubles(2.0, 2.0), doubles(1.0, 1.0), margin=doubles(1.0, 0.0))
    assert margin.tolist() == pytest.approx([math.log(2), won.item()], rel=1e-12)
    centred = pref.pairwise_loss(tie, tie, centring=0.5)
    assert centred.item() == pytest.approx(math.log(2) + 0.5, rel=1e-12)


def test_pairwise_survives_extreme_scores() -> None:
    """The loss of a badly wrong pair is its gap, not infinity, and its gradient is one."""
    rejected = doubles(1e4).requires_grad_()
    loss = pref.pairwise_loss(doubles(0.0), rejected)
    assert loss.item() == 1e4
    assert torch.autograd.grad(loss.sum(), rejected)[0].item() == 1.0
    assert pref.pairwise_loss(doubles(1e4), doubles(0.0)).item() == 0.0


@given(small, small, small)
def test_only_differences_of_scores_matter(chosen: float, rejected: float, shift: float) -> None:
    """A constant added to both changes nothing, unless scores are centred."""
    a = pref.pairwise_loss(doubles(chosen), doubles(rejected))
    b = pref.pairwise_loss(doubles(chosen + shift), doubles(rejected + shift))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_best_of_two_is_the_pairwise_loss() -> None:
    """And best of many does not depend on a common shift."""
    scores = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64)
    got = pref.best_of_n_loss(scores, torch.tensor([0, 1]))
    pairs = pref.pairwise_loss(doubles(0.3, 0.1), doubles(-1.2, 2.0))
    torch.testing.assert_close(got, pairs, rtol=1e-12, atol=1e-12)
    shifted = pref.best_of_n_loss(scores + 7, torch.tensor([0, 1]))
    torch.testing.assert_close(got, shifted, rtol=1e-9, atol=1e-9)


def test_rankings_are_means_over_their_pairs() -> None:
    """Two answers are one pair; ties make none; absent answers may be garbage."""
    scores = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    loss = {
        (i, j): pref.pairwise_loss(scores[:, i], scores[:, j]).item()
        for i in range(3)
        for j in range(3)
    }
    ranked = pref.k_wise_loss(scores, torch.tensor([[2, 0, 1]]))
    wanted = (loss[1, 0] + loss[1, 2] + loss[2, 0]) / 3
    assert ranked.item() == pytest.approx(wanted, rel=1e-12)
    tied = pref.k_wise_loss(scores, torch.tensor([[0, 1, 0]]))
    assert tied.item() == pytest.approx((loss[0, 1] + loss[2, 1]) / 2, rel=1e-12)
    dirty = torch.tensor([[0.3, -1.2, math.nan]], dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, True, False]])
    two = pref.k_wise_loss(dirty, torch.tensor([[0, 1, 2]]), present)
    assert two.item() == pytest.approx(loss[0, 1], rel=1e-12)
    (grad,) = torch.autograd.grad(two.sum(), dirty)
    assert grad[0, 2] == 0
    assert grad[0, :2].isfinite().all()


def test_prompts_without_a_pair_are_named() -> None:
    """All tied, or one answer left."""
    scores = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        pref.k_wise_loss(scores, torch.tensor([[0, 1], [1, 1]]))
    lone = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        pref.k_wise_loss(scores, torch.tensor([[0, 1], [0, 1]]), lone)


def test_dpo_at_the_reference() -> None:
    """Nothing learnt yet: log 2, and a gradient of beta / 2 towards the chosen answer."""
    zero = doubles(0.0).requires_grad_()
    loss = pref.dpo_loss(zero, doubles(0.0), beta=0.3)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert torch.autograd.grad(loss.sum(), zero)[0].item() == pytest.approx(-0.15, rel=1e-12)


@given(small, small, st.floats(0.01, 2), st.floats(0, 0.45))
def test_robust_dpo_undoes_flipped_labels(c: float, r: float, beta: float, flips: float) -> None:
    """Averaged over right and flipped labels it is the plain loss of the right ones."""
    pair, flipped = (doubles(c), doubles(r)), (doubles(r), doubles(c))
    settings = {"beta": beta, "label_smoothing": flips}
    right, wrong = (
        pref.robust_dpo_loss(*pair, **settings),
        pref.robust_dpo_loss(*flipped, **settings),
    )
    expected = (1 - flips) * right + flips * wrong
    torch.testing.assert_close(expected, pref.dpo_loss(*pair, beta=beta), rtol=1e-7, atol=1e-7)
    smoothed = pref.dpo_loss(*pair, **settings)
    mixture = (1 - flips) * pref.dpo_loss(*pair, beta=beta) + flips * pref.dpo_loss(
        *flipped, beta=beta
    )
    torch.testing.assert_close(smoothed, mixture, rtol=1e-9, atol=1e-9)


def test_defaults_of_the_dpo_family() -> None:
    """A beta of 0.1 and no smoothing."""
    a, b = doubles(3.0, -2.0), doubles(1.0, 4.0)
    plain = pref.dpo_loss(a, b)
    assert torch.equal(plain, pref.dpo_loss(a, b, beta=0.1, label_smoothing=0.0))
    assert torch.equal(plain, pref.robust_dpo_loss(a, b))
    torch.testing.assert_close(plain, pref.pairwise_loss(0.1 * a, 0.1 * b))
    assert torch.equal(pref.ipo_loss(a, b), pref.ipo_loss(a, b, beta=0.1))
    assert torch.equal(pref.hinge_dpo_loss(a, b), pref.hinge_dpo_loss(a, b, beta=0.1))
    lengths = torch.tensor([2, 4]), torch.tensor([1, 8])
    got = pref.ipo_loss_per_token(a, b, *lengths)
    assert got.tolist() == pytest.approx([(1.5 - 1 - 5) ** 2, (-0.5 - 0.5 - 5) ** 2], rel=1e-12)


def test_ipo_and_hinge_by_hand() -> None:
    """IPO regresses on a margin, from both sides; the hinge is satisfied beyond it."""
    a, b = doubles(3.0, 1.0, 9.0), doubles(1.0, 1.0, 1.0)
    assert pref.ipo_loss(a, b, beta=0.25).tolist() == [0.0, 4.0, 36.0]
    assert pref.hinge_dpo_loss(a, b, beta=0.25).tolist() == [0.5, 1.0, 0.0]
    assert pref.implicit_rewards(a, b, beta=0.5).tolist() == [1.0, 0.0, 4.0]


def test_impossible_settings_are_refused() -> None:
    """Half of the labels wrong, no beta, no tokens."""
    a, b = doubles(1.0), doubles(0.0)
    for smoothing in (-0.1, 0.5):
        for loss in (pref.dpo_loss, pref.robust_dpo_loss):
            with pytest.raises(ValueError, match="label_smoothing"):
                loss(a, b, label_smoothing=smoothing)
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="beta"):
            pref.ipo_loss(a, b, beta=beta)
    one, none = torch.tensor([1]), torch.tensor([0])
    for lengths in ((one, none), (none, one)):
        with pytest.raises(ValueError, match="tokens"):
            pref.ipo_loss_per_token(a, b, *lengths)
        with pytest.raises(ValueError, match="tokens"):
            pref.ipo_loss_per_token(
                a.repeat(2), b.repeat(2), *(torch.cat([one, n]) for n in lengths)
            )
    assert pref.ipo_loss_per_token(a, b, one, one, beta=0.5).item() == 0.0
