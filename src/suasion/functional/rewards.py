"""From one score per answer to one reward per token.

Order of use: rules for unfinished or long answers, clipping or scaling, then `token_rewards`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from suasion.functional.masking import zero_outside


def last_token_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Index of the last counted token of each row, wherever the padding stands.

    Args:
        mask: True where a token counts.

    Returns:
        Column indices.

    Raises:
        ValueError: A row has no counted token.
    """
    if not bool(mask.any(dim=1).all()):
        rows = torch.nonzero(~mask.any(dim=1)).flatten().tolist()
        raise ValueError(f"answers without a token have no last token: rows {rows}")
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, place, 0).amax(dim=1)


def terminal_rewards(
    scores: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Put each answer's score on its last counted token, zeros elsewhere.

    References differ by one place (some use the position after the EOS); here the token that ends
    the answer is paid for it.

    Args:
        scores: One score per answer.
        mask: True at the answer's tokens.

    Returns:
        Rewards per token.

    Raises:
        ValueError: A row has no counted token.
    """
    last = last_token_index(mask)
    place = torch.arange(mask.shape[1], device=mask.device)
    return zero_outside(scores[:, None].expand(mask.shape), place == last[:, None])


def token_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
) -> Float[Tensor, "B T"]:
    """The reward PPO maximises: `-kl_coef * kl` at every token, plus the score at the last one.

    Source: Ziegler et al. 1909.08593 eq. 2. `kl` must be the k1 estimate for the optimum to be the
    KL-regularised one (see `suasion.functional.kl`).

    Args:
        scores: One score per answer.
        kl: KL penalty per token, nats.
        mask: True at the answer's tokens.
        kl_coef: Score units per nat.

    Returns:
        Rewards per token, zero outside the mask.

    Raises:
        ValueError: A row has no counted token.
    """
    return terminal_rewards(scores, mask) - kl_coef * zero_outside(kl, mask)


def replace_without_eos(
    scores: Float[Tensor, " B"], has_eos: Bool[Tensor, " B"], *, value: float = -1.0
) -> Float[Tensor, " B"]:
    """Give every unfinished answer the same score, however good it began.

    Source: vwxyzjn/summarize_from_feedback_details@ee77a9ab
    summarize_from_feedback_details/ppo.py, `penalty_reward_value`.

    Args:
        scores: One score per answer.
        has_eos: Whether the answer ended by itself.
        value: The score of those that did not.

    Returns:
        Scores.
    """
    return torch.where(has_eos, scores, torch.full_like(scores, value))


def subtract_without_eos(
    scores: Float[Tensor, " B"], has_eos: Bool[Tensor, " B"], *, penalty: float = 1.0
) -> Float[Tensor, " B"]:
    """Take a penalty off every unfinished answer and keep what it earned.

    Source: huggingface/trl@f2cd5771 trl/experimental/ppo/ppo_trainer.py, `missing_eos_penalty`.

    Args:
        scores: One score per answer.
        has_eos: Whether the answer ended by itself.
        penalty: Taken off those that did not.

    Returns:
        Scores.
    """
    return torch.where(has_eos, scores, scores - penalty)


def overlong_penalty(
    lengths: Int[Tensor, " B"], *, max_length: int, buffer: int, factor: float = 1.0
) -> Float[Tensor, " B"]:
    """Soft punishment of length, to be added to the score: 0 falling to `-factor`.

    Zero up to `max_length - buffer` tokens, linear over the buffer, `-factor` from `max_length`.
    Source: DAPO, 2503.14476 eq. 13.

    Args:
        lengths: Tokens per answer.
        max_length: Length at which the whole penalty is due.
        buffer: Tokens over which it grows.
        factor: The whole penalty, in score units.

    Returns:
        Penalties, none positive.

    Raises:
        ValueError: The buffer is not inside `1..max_length`.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must lie in 1..{max_length}, got {buffer}")
    excess = (lengths - (max_length - buffer)).clamp(min=0, max=buffer)
    return -factor * (excess / buffer)


def clip_scores(scores: Float[Tensor, " B"], bound: float) -> Float[Tensor, " B"]:
    """Hold scores inside `-bound..bound`.

    Args:
        scores: One score per answer.
        bound: Largest magnitude.

    Returns:
        Scores.

    Raises:
        ValueError: The bound is not positive.
    """
    if bound <= 0:
        raise ValueError(f"bound must be positive, got {bound}")
    return scores.clamp(-bound, bound)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of every score seen so far.

    Attributes:
        mean: Mean of the scores.
        var: Biased variance of the scores.
        count: Number of scores, as a float.

    Example:
        `RunningMoments().update(scores).std` is the standard deviation of one batch.
    """

    mean: float = 0.0
    var: float = 1.0
    count: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation, in score units; 1 before there are two scores."""
        if self.count < 2:
            return 1.0
        return math.sqrt(self.var * self.count / (self.count - 1))

    def update(self, scores: Float[Tensor, " B"]) -> RunningMoments:
        """Merge a batch by the parallel form of Welford's algorithm.

        Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm";
        CarperAI/trlx@3340c2f3 trlx/utils/modeling.py, RunningMoments.

        Args:
            scores: New scores.

        Returns:
            The moments of all scores, old and new.

        Raises:
            ValueError: There is no score, or one is not finite.
        """
        if scores.numel() == 0 or not bool(scores.isfinite().all()):
            raise ValueError("running moments need at least one score and finite ones only")
        batch = scores.double()
        n = batch.numel()
        mean, var = float(batch.mean()), float(batch.var(correction=0))
        total = self.count + n
        delta = mean - self.mean
        squares = self.var * self.count + var * n + delta**2 * self.count * n / total
        return RunningMoments(self.mean + delta * n / total, squares / total, total)


def scale_scores(
    scores: Float[Tensor, " B"], *, std: float, mean: float = 0.0, eps: float = 1e-8
) -> Float[Tensor, " B"]:
    """Divide scores by a spread, after taking a mean off: `(score - mean) / (std + eps)`.

    trlX and TRL divide only (mean 0): the sign of a score then keeps its meaning.

    Args:
        scores: One score per answer.
        std: A standard deviation, usually `RunningMoments.std`.
        mean: Taken off first.
        eps: Added to `std`.

    Returns:
        Scores in standard deviations.
    """
    return (scores - mean) / (std + eps)


def affine_normalisation(
    scores: Float[Tensor, " B"], *, target_mean: float = 0.0, target_std: float = 1.0
) -> tuple[float, float]:
    """Gain and bias that bring a reward model's scores to a wanted mean and spread.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/train_reward.py:207
    (biased standard deviation).

    Args:
        scores: Scores of the un-normalised reward model on samples of the reference policy.
        target_mean: Wanted mean of `gain * score + bias`.
        target_std: Wanted biased standard deviation of the same.

    Returns:
        The gain and the bias.

    Raises:
        ValueError: The scores do not vary, so that no gain can spread them.
    """
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if not std > 0:
        raise ValueError(f"scores must vary to be normalised, their standard deviation is {std}")
    gain = target_std / std
    return gain, target_mean - gain * mean
