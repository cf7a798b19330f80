"""Attention within the sequences of a row, one after the other and in batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from suasion.models.packing import ALIKE, batches, one_by_one, together

Attend = Callable[[Tensor, Tensor, Tensor, list[int], float | None], Tensor]

LENGTHS = [5, 1, 9, 8, 1, 7]
CPU = torch.device("cpu")


def in_batches(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    """As on devices that have no kernels of their own for it."""
    return together(query, key, value, batches(lengths, CPU), scale=scale)


def each_alone(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None
) -> Tensor:
    """By definition: the softmax over a sequence's own past."""
    done = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        past = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        weights = scores.masked_fill(~past, -torch.inf).softmax(-1)
        done.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(done)


def inputs(dtype: torch.dtype, lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as a model gives them, parts of one tensor; and a gradient."""
    rng = torch.Generator().manual_seed(5)
    count = sum(lengths)
    fused = torch.randn(count, 3, 2, 8, generator=rng, dtype=torch.float64).to(dtype)
    slope = torch.randn(count, 2, 8, generator=rng, dtype=torch.float64).to(dtype)
    return [fused[:, i].requires_grad_() for i in range(3)], slope


def with_gradients(attend: Attend, dtype: torch.dtype, scale: float | None) -> list[Tensor]:
    """What comes out, and the gradients of what went in."""
    given_, slope = inputs(dtype, LENGTHS)
    out = attend(*given_, LENGTHS, scale)
    return [out.detach(), *torch.autograd.grad(out, given_, slope)]


@pytest.mark.parametrize("attend", [one_by_one, in_batches])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)],
)
def test_equals_the_definition(
    attend: Attend, scale: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Results and gradients; single tokens among the sequences."""
    found = with_gradients(attend, dtype, scale)
    given_, slope = inputs(dtype, LENGTHS)
    exact = [x.detach().double().requires_grad_() for x in given_]
    out = each_alone(*exact, LENGTHS, scale)
    expected = [out.detach(), *torch.autograd.grad(out, exact, slope.double())]
    for one, two in zip(found, expected, strict=True):
        assert one.dtype is dtype
        assert float((one.double() - two).norm() / two.norm()) < tolerance


def test_half_precision_is_as_exact_as_torchs_own() -> None:
    """Against float64 on the same rounded numbers, for results and gradients."""
    rng = torch.Generator().manual_seed(5)
    make = [torch.randn(96, 2, 16, generator=rng).bfloat16() for _ in range(4)]
    found = []
    for kind in ("ours", "torch", "exact"):
        *given_, slope = (x.double() if kind == "exact" else x for x in make)
        given_ = [x.detach().requires_grad_() for x in given_]
        if kind == "ours":
            out = one_by_one(*given_, [96], None)
        else:
            heads = [x.transpose(0, 1)[None] for x in given_]
            out = scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)
        found.append([out, *torch.autograd.grad(out, given_, slope)])
    for ours, theirs, exact in zip(*found, strict=True):
        assert (ours.double() - exact).norm() <= 1.01 * (theirs.double() - exact).norm()


def test_computed_again_under_checkpointing() -> None:
    """Saved tensors are asked for once, as recomputation wants it."""
    given_, slope = inputs(torch.float32, LENGTHS)
    found = []
    for again in (False, True):
        out = (
            checkpoint(one_by_one, *given_, LENGTHS, None, use_reentrant=False)
            if again
            else one_by_one(*given_, LENGTHS, None)
        )
        found.append(torch.autograd.grad(out, given_, slope))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_batches_hold_every_token_once(lengths: list[int]) -> None:
    """In their order, of sequences of like length."""
    found = batches(lengths, CPU)
    assert torch.equal(found.rows[found.home], torch.arange(sum(lengths)))
    assert sum(count for count, _ in found.shapes) == len(lengths)
    real = torch.zeros(len(found.rows), dtype=torch.bool)
    real[found.home] = True
    for part, (count, longest) in zip(
        real.split([count * longest for count, longest in found.shapes]), found.shapes, strict=True
    ):
        each = part.view(count, longest).sum(1)
        assert each.min() >= ALIKE * each.max()
        assert longest == each.max()


def test_dropout_reaches_the_kernel() -> None:
    """Weights are left out, differently each time."""
    given_, _ = inputs(torch.float32, LENGTHS)
    torch.manual_seed(0)
    one, two = (
        together(*given_, batches(LENGTHS, CPU), dropout_p=0.5, scale=None) for _ in range(2)
    )
    assert not torch.equal(one, two)
