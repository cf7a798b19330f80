"""Policy and value losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import losses
from suasion.functional.masking import masked_sum, zero_outside

SURROGATES: list[Callable[..., Tensor]] = [
    losses.clipped_surrogate,
    partial(losses.clipped_surrogate, dual_clip=3.0, log_ratio_clamp=20.0),
    partial(losses.cispo, ratio_max=2.0),
    lambda new, old, a: losses.policy_gradient(new, a) + 0 * old,
]


def doubles(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def at_ratio(*ratios: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities with the given ratios over old ones of -1."""
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    return (old + doubles(*ratios).log()).requires_grad_(), old


def slope(loss: Tensor, at: Tensor) -> list[float]:
    """Gradient of the sum."""
    grad: Tensor = torch.autograd.grad(loss.sum(), at)[0]
    return grad.tolist()


def test_published_numbers() -> None:
    """NVIDIA-NeMo/RL@7ea279ab tests/unit/algorithms/test_loss_functions.py, rounded there."""
    a, old = doubles(1.0, -1.0, 2.0), doubles(-1.0, -1.0, -1.0)
    new, rollout = doubles(-1.69315, -1.0, -0.59453), doubles(-0.5, -1.5, -0.8)
    ppo = losses.clipped_surrogate(new, old, a)
    assert ppo.mean().item() == pytest.approx(-0.63333, abs=2e-4)
    weights = losses.truncated_importance_weights(old, rollout, cap=math.inf)
    assert (weights * ppo).mean().item() == pytest.approx(-0.2065, abs=3e-4)
    plain = losses.policy_gradient(doubles(-0.5, -1.0, -1.5), a)
    assert plain.mean().item() == pytest.approx(0.83333, abs=2e-4)
    sequence = losses.sequence_mean_logprobs(new[None], torch.ones(1, 3).bool())
    ratio = losses.importance_ratio(sequence, doubles(-1.0))
    assert ratio.item() == pytest.approx(0.9086, abs=3e-4)
    gspo = losses.clipped_surrogate(sequence, doubles(-1.0), a.mean()[None])
    assert gspo.item() == pytest.approx(-0.6057, abs=3e-4)
    new, old, a = doubles(-1.69315, -1, -0.69741), doubles(-1, -1, -3), doubles(1, -1, -4)
    dual = losses.clipped_surrogate(new, old, a, dual_clip=3.0)
    assert dual.mean().item() == pytest.approx(4.1667, abs=2e-4)


def test_first_minibatch_is_the_plain_policy_gradient() -> None:
    """At ratio one the loss is -A exactly and its gradient is -A."""
    new, old = at_ratio(1.0, 1.0)
    a = doubles(0.7, -1.3)
    loss = losses.clipped_surrogate(new, old, a)
    assert loss.tolist() == [-0.7, 1.3]
    assert slope(loss, new) == [-0.7, 1.3]


def test_which_side_is_clipped_depends_on_the_advantage() -> None:
    """Gradients vanish where the step went far enough, and only there."""
    new, old = at_ratio(0.6, 0.6, 0.9, 1.15, 1.6, 1.6)
    a = doubles(2.0, -2.0, 2.0, -2.0, 2.0, -2.0)
    loss = losses.clipped_surrogate(new, old, a, clip_low=0.3, clip_high=0.4)
    assert loss.tolist() == pytest.approx([-1.2, 1.4, -1.8, 2.3, -2.8, 3.2], rel=1e-12)
    wanted = [-1.2, 0.0, -1.8, 2.3, 0.0, 3.2]
    assert slope(loss, new) == pytest.approx(wanted, rel=1e-12)


def test_default_bounds() -> None:
    """0.2 on both sides."""
    new, old = at_ratio(0.5, 1.5)
    loss = losses.clipped_surrogate(new, old, doubles(-1.0, 1.0))
    assert loss.tolist() == pytest.approx([0.8, -1.2], rel=1e-12)


def test_dual_clip_bounds_only_bad_actions() -> None:
    """A runaway ratio on a negative advantage stops pulling; a positive one was bounded anyway."""
    new, old = at_ratio(10.0, 10.0, 2.0, 0.1)
    a = doubles(-1.5, 1.5, -1.5, 1.5)
    loss = losses.clipped_surrogate(new, old, a, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([4.5, -1.8, 3.0, -0.15], rel=1e-12)
    assert slope(loss, new) == pytest.approx([0.0, 0.0, 3.0, -0.15], rel=1e-12)
    assert losses.clipped_surrogate(new, old, a)[0].item() == pytest.approx(15.0, rel=1e-12)
    tight = losses.clipped_surrogate(new, old, a, dual_clip=1.5)
    assert tight.tolist() == pytest.approx([2.25, -1.8, 2.25, -0.15], rel=1e-12)
    for bad in (1.0, 0.5):
        with pytest.raises(ValueError, match="exceed 1"):
            losses.clipped_surrogate(new, old, a, dual_clip=bad)


def test_log_ratio_clamp_keeps_the_loss_finite() -> None:
    """On both sides, and without a gradient beyond the bound."""
    old = doubles(-2000.0, 0.0, -1.0)
    new = doubles(0.0, -2000.0, -0.5).requires_grad_()
    assert losses.importance_ratio(new, old)[0].isinf()
    ratio = losses.importance_ratio(new, old, log_ratio_clamp=2.0)
    wanted = [math.exp(2), math.exp(-2), math.exp(0.5)]
    assert ratio.tolist() == pytest.approx(wanted, rel=1e-12)
    loss = losses.clipped_surrogate(new, old, doubles(-1, -1, -1), log_ratio_clamp=2.0)
    assert loss.tolist() == pytest.approx([math.exp(2), 0.8, math.exp(0.5)], rel=1e-12)
    assert slope(loss, new) == pytest.approx([0.0, 0.0, math.exp(0.5)], rel=1e-12)


finite = st.floats(-5, 0)


@given(finite, finite, st.floats(-3, 3), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_clipping_is_pessimistic(new: float, old: float, a: float, low: float, high: float) -> None:
    """The clipped loss is never below the plain one, and equal inside the band."""
    args = doubles(new), doubles(old), doubles(a)
    loss = losses.clipped_surrogate(*args, clip_low=low, clip_high=high)
    plain = -args[2] * losses.importance_ratio(args[0], args[1])
    assert loss >= plain
    if 1 - low < math.exp(new - old) < 1 + high:
        assert loss == plain


@pytest.mark.parametrize("loss", SURROGATES)
def test_padding_filled_with_garbage_reaches_no_weight(loss: Callable[..., Tensor]) -> None:
    """Inputs zeroed outside the mask: same sum, and gradients of exactly zero there."""
    mask = torch.tensor([True, False, True, False, False])
    good = doubles(-1.2, -0.7, -0.4, -3.0, -2.0)
    bad = torch.where(mask, good, doubles(0, math.nan, 0, -math.inf, math.inf)).requires_grad_()
    old, a = doubles(-1.0, -1.0, -1.0, -1.0, -1.0), doubles(1.5, math.nan, -0.5, 1.0, math.inf)
    clean = zero_outside(bad, mask), zero_outside(old, mask), zero_outside(a, mask)
    total = masked_sum(loss(*clean), mask)
    assert total == loss(good[mask], old[mask], a[mask]).sum()
    (grad,) = torch.autograd.grad(total, bad)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()


def test_value_loss_by_hand() -> None:
    """The larger error counts; a value that ran away past its target keeps no gradient."""
    values = doubles(1.0, 1.0, 0.1, -1.0).requires_grad_()
    old, returns = doubles(0.0, 0.0, 0.0, 0.0), doubles(2.0, -2.0, 2.0, -2.0)
    loss = losses.clipped_value_loss(values, old, returns, clip=0.5)
    assert loss.tolist() == pytest.approx([1.125, 4.5, 1.805, 1.125], rel=1e-12)
    assert slope(loss, values) == pytest.approx([0.0, 3.0, -1.9, 0.0], rel=1e-12)
    plain = losses.clipped_value_loss(values, old, returns, clip=None)
    assert plain.tolist() == pytest.approx([0.5, 4.5, 1.805, 0.5], rel=1e-12)
    default = losses.clipped_value_loss(values, old, returns)
    assert default.tolist() == pytest.approx([1.62, 4.5, 1.805, 1.62], rel=1e-12)


def test_cispo_keeps_the_gradient_ppo_drops() -> None:
    """A clipped token pulls with the bounded weight; the weight itself has no gradient."""
    new, old = at_ratio(5.0, 0.5)
    a = doubles(2.0, 2.0)
    loss = losses.cispo(new, old, a, ratio_max=1.5)
    weight = doubles(1.5, 0.5)
    torch.testing.assert_close(loss, -weight * a * new, rtol=1e-12, atol=0)
    assert slope(loss, new) == pytest.approx([-3.0, -1.0], rel=1e-12)
    assert slope(losses.clipped_surrogate(new, old, a), new)[0] == 0.0


def test_mismatch_weights() -> None:
    """Truncated above, or zero outside a band whose ends belong to it; never a gradient."""
    new, old = at_ratio(0.25, 0.5, 1.0, 1.9, 3.0)
    tis = losses.truncated_importance_weights(new, old)
    assert tis.tolist() == pytest.approx([0.25, 0.5, 1.0, 1.9, 2.0], rel=1e-12)
    assert losses.truncated_importance_weights(new, old, cap=2.5)[4].item() == pytest.approx(2.5)
    assert not tis.requires_grad
    pop = losses.icepop_weights(new, old, low=0.4)
    assert pop.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.9, 0.0], rel=1e-12)
    assert not pop.requires_grad
    ends = losses.icepop_weights(doubles(0.0, 0.0, 0.0), doubles(0.0, 0.0, 0.0), low=1.0, high=1.0)
    assert ends.tolist() == [1.0, 1.0, 1.0]
    edges, old = at_ratio(0.45, 0.55, 1.95, 2.05)
    wanted = [0.0, 0.55, 1.95, 0.0]
    assert losses.icepop_weights(edges, old).tolist() == pytest.approx(wanted, rel=1e-12)


def test_sequence_mean_is_length_normalised() -> None:
    """Padding does not dilute it, and an answer without tokens is refused."""
    logprobs = torch.tensor([[-1.0, -3.0, math.nan], [-2.0, -2.5, -3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert losses.sequence_mean_logprobs(logprobs, mask).tolist() == [-2.0, -2.5]
    with pytest.raises(ValueError, match="empty"):
        losses.sequence_mean_logprobs(logprobs, mask & torch.tensor([[True], [False]]))


def test_entropy_is_sought() -> None:
    """More entropy, less loss."""
    assert losses.entropy_bonus(doubles(0.5, 2.0), coef=0.25).tolist() == [-0.125, -0.5]


def test_inputs_are_never_edited() -> None:
    """Pure functions."""
    new, old = at_ratio(3.0, 0.2)
    a = doubles(1.0, -1.0)
    before = [x.detach().clone() for x in (new, old, a)]
    for loss in SURROGATES:
        loss(new, old, a)
    losses.clipped_value_loss(new, old, a)
    losses.icepop_weights(new, old)
    for x, y in zip((new, old, a), before, strict=True):
        assert torch.equal(x, y)
