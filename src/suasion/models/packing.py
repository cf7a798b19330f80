"""Causal attention within each of the sequences that lie side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

ALIKE = 0.75
"""Of the longest sequence's length, the least for another to be in its batch."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None
) -> Tensor:
    """Causal attention of one sequence after the other, by the processor's kernels.

    Args:
        query: [N, H, D].
        key: [N, H, D].
        value: [N, H, D].
        lengths: Tokens of each sequence, in the order in which they lie in the row.
        scale: Of the scores; None for one over the square root of D.

    Returns:
        [N, H, D].
    """
    found: Tensor = _OneByOne.apply(query, key, value, list(lengths), scale)
    return found


class _OneByOne(torch.autograd.Function):
    """Forward in the inputs' type, backward in float32 or wider.

    The backward kernel is no faster in bf16, on short sequences several times as slow, and half as
    exact. What it takes and gives is converted while it is in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        scale: float | None,
    ) -> Tensor:
        inputs = (_apart(x, lengths) for x in (query, key, value))
        done = [
            _flash(*part, dropout_p=0.0, is_causal=True, scale=scale)
            for part in zip(*inputs, strict=True)
        ]
        out = torch.cat([part[0].transpose(0, 1) for part, _ in done])
        ctx.save_for_backward(query, key, value, out, *(total for _, total in done))
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *totals = ctx.saved_tensors
        wide = torch.promote_types(out.dtype, torch.float32)
        given = (_apart(x, ctx.lengths) for x in (grad, query, key, value, out))
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        wanted = (_apart(x, ctx.lengths) for x in grads)
        for total, *parts in zip(totals, *given, *wanted, strict=True):
            inputs = [x.to(wide) for x in parts[:5]]
            found = _flash_backward(*inputs, total, dropout_p=0.0, is_causal=True, scale=ctx.scale)
            for into, x in zip(parts[5:], found, strict=True):
                into.copy_(x)
        return *grads, None, None


def _apart(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """[N, H, D] -> a view of each sequence, [1, H, T, D]."""
    return x.transpose(0, 1)[None].split(lengths, dim=2)


@dataclass(frozen=True)
class Batches:
    """Sequences of a row of tokens, [N], sorted into batches of like length.

    The shorter ones are filled up behind their end, where causal attention never looks.
    """

    shapes: list[tuple[int, int]]
    """Of each batch its sequences, and tokens of the longest."""
    rows: Tensor
    """Places in the row of what is in the batches, one after the other, [M]; behind a sequence's
    end, of its last token."""
    home: Tensor
    """Where in the batches each token of the row is, [N]."""


def batches(lengths: Sequence[int], device: torch.device) -> Batches:
    """Sort sequences of like length into batches: a few kernels for all, where each costs time.

    Args:
        lengths: Tokens of each, in the order in which they lie in the row.
        device: Of the tokens.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[index] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    rows, real = [], []
    for group in groups:
        places, is_real = filled_up(lengths, group)
        rows.append(places.flatten())
        real.append(is_real.flatten())
    held = torch.cat(real).nonzero().squeeze(-1)
    # As numbers: what a mask selects, a GPU has to tell first, in every layer.
    home = torch.empty(sum(lengths), dtype=torch.long).index_copy(0, torch.cat(rows)[held], held)
    shapes = [(len(group), lengths[group[0]]) for group in groups]
    return Batches(shapes, torch.cat(rows).to(device), home.to(device))


def filled_up(lengths: Sequence[int], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where in a row some of its sequences are, filled up to one length.

    Args:
        lengths: Tokens of each sequence of the row.
        chosen: Numbers of n of them.

    Returns:
        Places in the row [n, longest], behind a sequence's end those of its last token; and which
        of them are no filling, bool.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    each = torch.tensor([lengths[i] for i in chosen])[:, None]
    inner = torch.arange(int(each.max()))
    return starts[list(chosen), None] + torch.minimum(inner, each - 1), inner < each


def together(query: Tensor, key: Tensor, value: Tensor, parts: Batches, **options: Any) -> Tensor:
    """Causal attention of sequences in batches.

    Args:
        query: [N, H, D].
        key: [N, H, D].
        value: [N, H, D].
        parts: Of which the row consists.
        options: `scale` and `dropout_p` of torch's `scaled_dot_product_attention`.

    Returns:
        [N, H, D].
    """
    sizes = [count * longest for count, longest in parts.shapes]
    inputs = (x.index_select(0, parts.rows).split(sizes) for x in (query, key, value))
    done = []
    for shape, *part in zip(parts.shapes, *inputs, strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in part)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        done.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(done).index_select(0, parts.home)
