"""Masks, sums, whitening, positions and truncation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suasion.functional import masking

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[True, True, False], [True, False, False]])
GARBAGE = torch.tensor([[1.5, -0.25, NAN], [3.0, INF, -INF]], dtype=torch.float64)
CLEAN = torch.tensor([[1.5, -0.25, 7.0], [3.0, 8.0, 9.0]], dtype=torch.float64)


def numbers(n: int) -> st.SearchStrategy[list[float]]:
    """Lists of moderate floats."""
    return st.lists(st.floats(-100, 100), min_size=n, max_size=n)


def test_garbage_never_counts() -> None:
    """NaN and infinity outside the mask change no result by a bit."""
    for x in (GARBAGE, CLEAN):
        assert masking.masked_sum(x, MASK) == 4.25
        assert masking.masked_sum(x, MASK, dim=1).tolist() == [1.25, 3.0]
        assert masking.masked_mean(x, MASK, dim=1).tolist() == [0.625, 3.0]
        assert masking.zero_outside(x, MASK).tolist() == [[1.5, -0.25, 0.0], [3.0, 0.0, 0.0]]
    whitened = masking.whiten(GARBAGE, MASK)
    assert torch.equal(whitened, masking.whiten(CLEAN, MASK))
    assert (whitened[~MASK] == 0).all()
    kept = masking.whiten(GARBAGE, MASK, shift_mean=False)
    assert (kept[~MASK] == 0).all()


def test_garbage_gets_no_gradient() -> None:
    """What does not count gets a gradient of exactly zero, garbage or not."""
    for function in (
        masking.masked_mean,
        lambda x, mask: masking.masked_var(x, mask, ddof=1),
        lambda x, mask: (masking.whiten(x, mask) * CLEAN).sum(),
        lambda x, mask: masking.zero_outside(x, mask).exp().sum(),
    ):
        x = GARBAGE.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, MASK), x)
        assert (grad[~MASK] == 0).all()
        assert grad[MASK].isfinite().all()
        assert (grad[MASK] != 0).any()


def test_a_mean_of_means_is_another_number() -> None:
    """One token of loss 10 and nine of 0 average to 1, not to 5."""
    x = torch.zeros(2, 9, dtype=torch.float64)
    x[0, 0] = 10.0
    mask = masking.length_mask(torch.tensor([1, 9]), 9)
    assert masking.masked_mean(x, mask) == 1.0
    assert masking.masked_mean(x, mask, dim=1).mean() == 5.0


def test_nothing_counted_is_an_error_not_a_number() -> None:
    """Means of nothing and variances of too little are refused."""
    empty = torch.zeros(2, 3).bool()
    with pytest.raises(ValueError, match="empty"):
        masking.masked_mean(CLEAN, empty)
    with pytest.raises(ValueError, match="empty"):
        masking.masked_mean(CLEAN, MASK & torch.tensor([[True], [False]]), dim=1)
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert masking.masked_var(CLEAN, one, ddof=0) == 0.0
    with pytest.raises(ValueError, match="over 1 elements, got 1"):
        masking.masked_var(CLEAN, one, ddof=1)
    assert masking.masked_sum(CLEAN, empty) == 0.0


def test_constant_input_whitens_to_zero() -> None:
    """Variance zero gives zeros, or the constant when the mean is kept."""
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    mask = torch.ones_like(x).bool()
    assert masking.whiten(x, mask).tolist() == [[0.0] * 4]
    assert masking.whiten(x, mask, shift_mean=False).tolist() == [[0.5] * 4]


def test_epsilon_stands_inside_the_root() -> None:
    """Deviations of one and a variance of one, with a large epsilon."""
    x = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    mask = torch.ones_like(x).bool()
    assert masking.whiten(x, mask, eps=3.0).tolist() == [[-0.5, 0.5]]
    assert masking.whiten(x, mask, eps=0.0).tolist() == [[-1.0, 1.0]]
    default = masking.whiten(x * 1e-4, mask)
    assert default[0, 1].item() == pytest.approx(1e-4 / (2e-8) ** 0.5, rel=1e-12)


@given(numbers(6), st.floats(-50, 50))
def test_whitening_ignores_a_shift(values: list[float], shift: float) -> None:
    """A constant added to all changes nothing; the variance comes out below or at one."""
    x = torch.tensor(values, dtype=torch.float64).reshape(2, 3)
    first, second = masking.whiten(x, MASK, eps=1e-2), masking.whiten(x + shift, MASK, eps=1e-2)
    assert torch.allclose(first, second, rtol=1e-7, atol=1e-7)
    assert masking.masked_var(first, MASK, ddof=0) <= 1 + 1e-9
    assert abs(masking.masked_sum(first, MASK)) < 1e-6


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_lengths_and_masks_say_the_same(lengths: list[int]) -> None:
    """A length mask has as many counted places as the length, all in front."""
    mask = masking.length_mask(torch.tensor(lengths), 7)
    assert mask.tolist() == [[i < n for i in range(7)] for n in lengths]


@pytest.mark.parametrize("length", [-1, 4])
def test_impossible_lengths_are_refused(length: int) -> None:
    """Lengths outside the row are named."""
    with pytest.raises(ValueError, match=rf"0\.\.3, got \[1, {length}\]"):
        masking.length_mask(torch.tensor([1, length]), 3)


def test_pad_may_be_the_eos() -> None:
    """The EOS that ends an answer counts although padding looks like it."""
    tokens = torch.tensor([[5, 2, 7, 2], [2, 2, 2, 2], [5, 6, 7, 8]])
    cut, lengths, ended = masking.truncate_after_eos(tokens, eos=2, pad=2)
    assert cut.tolist() == [[5, 2, 2, 2], [2, 2, 2, 2], [5, 6, 7, 8]]
    assert lengths.tolist() == [2, 1, 4]
    assert ended.tolist() == [True, True, False]
    assert tokens[0].tolist() == [5, 2, 7, 2], "the input is left alone"


def test_positions_count_attended_tokens_only() -> None:
    """Left padding shifts nothing."""
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert masking.position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_sequence_weights_sum_to_one_per_answer() -> None:
    """Every answer weighs the same; an empty one weighs nothing."""
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    weights = masking.sequence_mean_weights(mask)
    assert torch.allclose(weights.sum(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert weights[0].tolist() == [0.5, 0.5, 0.0]


def test_inputs_are_never_edited() -> None:
    """Pure functions."""
    x, mask = GARBAGE.clone(), MASK.clone()
    masking.whiten(x, mask)
    masking.masked_sum(x, mask, dim=1)
    same: Tensor = (x == GARBAGE) | (x.isnan() & GARBAGE.isnan())
    assert same.all()
    assert torch.equal(mask, MASK)
