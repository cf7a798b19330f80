"""KL estimators and the controllers of their coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import kl

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.2, 0.25, 0.15], dtype=torch.float64)
EXACT = (POLICY * (POLICY / REFERENCE).log()).sum()
logprob = st.floats(-20, 0)


def test_published_numbers() -> None:
    """NVIDIA-NeMo/RL@7ea279ab tests/unit/algorithms/test_utils.py prints these, rounded."""
    new, ref = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0.0, -15.0, -30.0])
    assert kl.k1(new, ref).tolist() == [-1.0, 14.0, 29.0]
    assert kl.k2(new, ref).tolist() == [0.5, 98.0, 420.5]
    assert kl.k3(new, ref).tolist() == pytest.approx([0.7183, 13.0, 28.0], abs=1e-4)
    assert kl.absolute_difference(new, ref).tolist() == [1.0, 14.0, 29.0]
    rows = torch.tensor([[0.98, 0.01, 0.01], [0.49, 0.02, 0.49]]).log()
    others = torch.tensor([[0.01, 0.01, 0.98], [0.01, 0.98, 0.01]]).log()
    # huggingface/trl@v0.11.4 tests/test_ppo_trainer.py.
    assert kl.full_kl(rows, others).tolist() == pytest.approx([4.4474, 3.7361], abs=1e-4)


def test_expectations_under_the_policy() -> None:
    """k1 and k3 are unbiased for KL(policy || reference), k2 is not, and direction matters."""
    new, ref = POLICY.log(), REFERENCE.log()
    assert (POLICY * kl.k1(new, ref)).sum().item() == pytest.approx(EXACT.item(), rel=1e-12)
    assert (POLICY * kl.k3(new, ref)).sum().item() == pytest.approx(EXACT.item(), rel=1e-12)
    assert kl.full_kl(new, ref).item() == pytest.approx(EXACT.item(), rel=1e-12)
    assert (POLICY * kl.k2(new, ref)).sum().item() != pytest.approx(EXACT.item(), rel=1e-2)
    assert kl.full_kl(ref, new).item() != pytest.approx(EXACT.item(), rel=1e-2)


def as_loss(estimator: object) -> Tensor:
    """Expected gradient, by logits, of an estimator averaged over samples of the policy."""
    logits = POLICY.log().requires_grad_()
    values = estimator(torch.log_softmax(logits, 0), REFERENCE.log())  # type: ignore[operator]
    return torch.autograd.grad((POLICY * values).sum(), logits)[0]


def test_what_each_estimator_optimises_as_a_loss() -> None:
    """k2 follows the KL, k1 follows nothing, k3 follows the KL in the other direction."""
    logits = POLICY.log().requires_grad_()
    (reverse,) = torch.autograd.grad(kl.full_kl(logits, REFERENCE.log()), logits)
    (forward,) = torch.autograd.grad(kl.full_kl(REFERENCE.log(), logits), logits)
    torch.testing.assert_close(as_loss(kl.k2), reverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(as_loss(kl.k1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(as_loss(kl.k3), forward, rtol=1e-9, atol=1e-12)
    mixed = as_loss(lambda new, ref: kl.with_gradient_of(kl.k3(new, ref), kl.k2(new, ref)))
    torch.testing.assert_close(mixed, reverse, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(forward, reverse, rtol=1e-2)


def test_straight_through_keeps_the_value() -> None:
    """The value is the first argument's, to the last bit or nearly."""
    new, ref = POLICY.log(), REFERENCE.log()
    value = kl.with_gradient_of(kl.k3(new, ref), kl.k2(new, ref))
    torch.testing.assert_close(value, kl.k3(new, ref), rtol=1e-12, atol=1e-12)


@given(logprob, logprob)
def test_signs_and_zero(new: float, ref: float) -> None:
    """k2 and k3 are never negative; all are zero where the policies agree."""
    a, b = torch.tensor([new]).double(), torch.tensor([ref]).double()
    assert kl.k2(a, b) >= 0
    assert kl.k3(a, b) >= 0
    assert kl.k1(a, b) == -kl.k1(b, a)
    for estimator in (kl.k1, kl.k2, kl.k3, kl.absolute_difference):
        assert estimator(a, a) == 0


def test_k3_clamp_bounds_the_exponent() -> None:
    """A token the policy has nearly forgotten does not overflow, on either side."""
    new, ref = torch.tensor([-1000.0, 0.0, -1.0]), torch.tensor([0.0, -1000.0, -1.5])
    assert kl.k3(new, ref)[0].isinf()
    bounded = kl.k3(new, ref, log_ratio_clamp=3.0)
    wanted = [math.expm1(3) - 3, math.expm1(-3) + 3, math.expm1(-0.5) + 0.5]
    assert bounded.tolist() == pytest.approx(wanted, rel=1e-6)


def test_full_kl_with_forbidden_tokens_and_temperature() -> None:
    """Minus infinity on both sides adds nothing; the temperature divides both logits."""
    p = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.float64)
    q = torch.tensor([2.0, 1.0, -torch.inf], dtype=torch.float64)
    assert kl.full_kl(p, q).item() == pytest.approx(kl.full_kl(p[:2], q[:2]).item(), rel=1e-12)
    assert kl.full_kl(p, q, 0.5).item() == pytest.approx(kl.full_kl(2 * p, 2 * q).item(), rel=1e-12)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            kl.full_kl(p, q, temperature)


def test_controllers_by_hand() -> None:
    """Below the target the coefficient falls, above it rises, and the error is bounded."""
    step = {"target": 5.0, "n": 100, "horizon": 1000.0}
    assert kl.adaptive_kl_coef(1.0, 5.5, **step) == pytest.approx(1.01, rel=1e-12)
    assert kl.adaptive_kl_coef(1.0, 50.0, **step) == pytest.approx(1.02, rel=1e-12)
    assert kl.adaptive_kl_coef(1.0, -50.0, **step) == pytest.approx(0.98, rel=1e-12)
    assert kl.adaptive_kl_coef(1.0, 50.0, **step, clip=0.5) == pytest.approx(1.05, rel=1e-12)
    assert kl.paper_kl_coef(2.0, 50.0, target=5.0) == pytest.approx(2.04, rel=1e-12)
    assert kl.paper_kl_coef(2.0, 50.0, target=5.0, gain=0.5) == pytest.approx(2.2, rel=1e-12)
    assert kl.paper_kl_coef(2.0, 50.0, target=5.0, clip=0.3) == pytest.approx(2.06, rel=1e-12)
    assert kl.fixed_kl_coef(0.3, 50.0) == 0.3
    path = [kl.linear_kl_coef(0.4, 0.1, p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert path == pytest.approx([0.4, 0.4, 0.25, 0.1, 0.1], rel=1e-12)


@pytest.mark.parametrize("observed", [math.nan, math.inf, -math.inf])
def test_controllers_refuse_a_broken_kl(observed: float) -> None:
    """A NaN must not become a coefficient."""
    with pytest.raises(ValueError, match="finite"):
        kl.adaptive_kl_coef(0.1, observed, target=6.0, n=1, horizon=10.0)
    with pytest.raises(ValueError, match="finite"):
        kl.paper_kl_coef(0.1, observed, target=6.0)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_controllers_refuse_impossible_settings(bad: float) -> None:
    """Targets and horizons are positive; small positive ones are accepted."""
    with pytest.raises(ValueError, match="target"):
        kl.paper_kl_coef(0.1, 1.0, target=bad)
    with pytest.raises(ValueError, match="horizon"):
        kl.adaptive_kl_coef(0.1, 1.0, target=1.0, n=1, horizon=bad)
    assert kl.adaptive_kl_coef(0.1, 0.5, target=0.5, n=1, horizon=0.5) == 0.1


def test_adaptive_control_settles_at_its_target() -> None:
    """Closed loop on a system whose KL falls with the coefficient: dips, rises, settles."""
    coef, path = 0.05, []
    for _ in range(2000):
        coef = kl.adaptive_kl_coef(coef, 0.9 / coef, target=6.0, n=512, horizon=10000.0)
        path.append(coef)
    assert 0.9 / path[-1] == pytest.approx(6.0, rel=1e-6)
