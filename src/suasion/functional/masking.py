"""Sums, means and whitening over the positions that count.

Every `mask` of this library is boolean and True means "counts". What stands at the other positions
may be anything, NaN and infinity included: it is replaced by zero before it is used, never
multiplied by zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def zero_outside(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return `x` with exact zeros where `mask` is False, garbage and its gradient cut off.

    Apply it to the inputs of a loss, not only to the loss: the backward pass of `exp(inf)` times
    zero is NaN, and a NaN at a padded position reaches every weight.

    Args:
        x: Any values.
        mask: True where `x` counts.

    Returns:
        A new tensor of the shape of `x`.
    """
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Sum of the counted elements.

    Args:
        x: Values, in any unit.
        mask: True where `x` counts.
        dim: The axis to sum over; None sums over all of them. An empty row sums to zero.

    Returns:
        A scalar, or `x` without the axis `dim`.
    """
    kept = zero_outside(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Mean of the counted elements.

    For reporting. A loss is summed, and divided once by a count taken over all micro-batches:
    a mean of such means weighs a short answer's tokens more than a long one's.

    Args:
        x: Values, in any unit.
        mask: True where `x` counts.
        dim: The axis to average over; None averages over all of them.

    Returns:
        A scalar, or `x` without the axis `dim`.

    Raises:
        ValueError: Nothing counts, in all or in one row along `dim`.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    if bool((count == 0).any()):
        raise ValueError("the mean of no element is undefined: the mask has an empty row")
    return masked_sum(x, mask, dim) / count


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, ddof: int
) -> Float[Tensor, ""]:
    """Variance of the counted elements, `sum (x - mean)^2 / (n - ddof)`.

    The references disagree on `ddof`: 0 in openai/lm-human-preferences@cbfd210b
    lm_human_preferences/utils/core.py:336, 1 in huggingface/trl@v0.11.4 trl/core.py.

    Args:
        x: Values.
        mask: True where `x` counts.
        ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
        A scalar, in the squared unit of `x`.

    Raises:
        ValueError: No more than `ddof` elements count.
    """
    count = mask.sum()
    if int(count) <= ddof:
        raise ValueError(
            f"a variance with ddof={ddof} needs over {ddof} elements, got {int(count)}"
        )
    centred = zero_outside(x - masked_mean(x, mask), mask)
    return centred.square().sum() / (count - ddof)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    ddof: int = 0,
    eps: float = 1e-8,
    shift_mean: bool = True,
) -> Float[Tensor, "*shape"]:
    """Scale the counted elements to variance one, `(x - mean) / sqrt(var + eps)`.

    `eps` stands inside the root, as in openai/lm-human-preferences@cbfd210b
    lm_human_preferences/utils/core.py:336; a constant input gives zeros, not NaN.

    Args:
        x: Values, advantages or rewards.
        mask: True where `x` counts.
        ddof: 0 for the biased variance, 1 for the unbiased one.
        eps: Added to the variance.
        shift_mean: Leave the mean at zero; False adds the old mean back (reward whitening).

    Returns:
        The whitened values, exact zeros where nothing counts.

    Raises:
        ValueError: No more than `ddof` elements count.
    """
    # Garbage goes first: in the backward pass it would meet the scale in a product.
    x = zero_outside(x, mask)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask, ddof=ddof) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return zero_outside(whitened, mask)


def sequence_mean_weights(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights that turn a sum over tokens into a sum of per-sequence means.

    The aggregations in use are all `sum(weights * loss) / count`, with the count taken over the
    whole step: token mean has weights `mask` and counts tokens; "seq-mean-token-mean" (GRPO,
    2402.03300 eq. 3) has these weights and counts sequences; Dr. GRPO (2503.20783) has
    `mask / constant` and counts sequences.

    Args:
        mask: True where a token counts.

    Returns:
        `1 / length` at counted tokens and zero elsewhere; an empty row has no weight.
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask / lengths


def position_ids(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that count only attended tokens: the exclusive running sum of the mask.

    Left padding then changes nothing for the tokens after it.
    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/language/model.py.

    Args:
        mask: True where a token is attended to.

    Returns:
        For each place the number of counted tokens before it.
    """
    counted = mask.long()
    return counted.cumsum(dim=1) - counted


def length_mask(lengths: Int[Tensor, " B"], width: int) -> Bool[Tensor, "B T"]:
    """Mask of right-padded rows: True in the first `lengths[i]` places.

    Lengths are given and never inferred from padding: in many models the pad token is the EOS
    token, and then the EOS that ends an answer would be lost from the loss.

    Args:
        lengths: Tokens per row, EOS included.
        width: Tokens per padded row.

    Returns:
        The mask.

    Raises:
        ValueError: A length lies outside `0..width`.
    """
    if bool(((lengths < 0) | (lengths > width)).any()):
        raise ValueError(f"lengths must lie in 0..{width}, got {lengths.tolist()}")
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def truncate_after_eos(
    tokens: Int[Tensor, "B T"], *, eos: int, pad: int, start: int = 0
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Cut sampled answers after their first EOS, which itself counts.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/lm_tasks.py (its
    `truncate_after` is `start` here, its `truncate_token` is `eos`).

    Args:
        tokens: Sampled answers, whatever follows the EOS.
        eos: The token that ends an answer.
        pad: Written after it; may equal `eos`.
        start: An EOS before this index does not end the answer.

    Returns:
        The answers with `pad` after the EOS; their lengths in tokens, EOS included; whether an EOS
        ended them.
    """
    width = tokens.shape[1]
    place = torch.arange(width, device=tokens.device)
    ends = (tokens == eos) & (place >= start)
    has_eos = ends.any(dim=1)
    first = torch.where(ends, place, width).amin(dim=1)
    lengths = torch.where(has_eos, first + 1, width)
    cut = torch.where(length_mask(lengths, width), tokens, pad)
    return cut, lengths, has_eos
