"""What a PPO run reports about itself: scalars, masked, without gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suasion.functional.losses import importance_ratio
from suasion.functional.masking import masked_mean, masked_var


@torch.no_grad()
def approx_kl_k2(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """Distance an update has gone, `mean (new - old)^2 / 2`, nats per token.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/train_policy.py, `approxkl`.
    Unmasked versions of it exist and are diluted by padding.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that sampled them, nats.
        mask: True where a token counts.

    Returns:
        A scalar, never negative.

    Raises:
        ValueError: Nothing counts.
    """
    return masked_mean(0.5 * (logprobs - old_logprobs).square(), mask)


@torch.no_grad()
def approx_kl_k3(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """Unbiased estimate of KL(old || new), `mean (r - 1 - log r)`, nats per token.

    Source: DLR-RM/stable-baselines3@e05d2dbe stable_baselines3/ppo/ppo.py.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that sampled them, nats.
        mask: True where a token counts.

    Returns:
        A scalar, never negative.

    Raises:
        ValueError: Nothing counts.
    """
    log_ratio = logprobs - old_logprobs
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)


@torch.no_grad()
def policy_kl(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """The plain estimate of KL(old || new), `mean (old - new)`, nats per token.

    Of either sign on a finite sample. Source: huggingface/trl@v0.11.4 trl/trainer/ppo_trainer.py,
    `policy/policykl`, which stops an epoch early by it.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that sampled them, nats.
        mask: True where a token counts.

    Returns:
        A scalar.

    Raises:
        ValueError: Nothing counts.
    """
    return masked_mean(old_logprobs - logprobs, mask)


@torch.no_grad()
def clip_fraction(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, ""]:
    """Part of the tokens whose gradient the clipping cut: the clipped loss is the larger one.

    The convention of openai/lm-human-preferences, TRL, verl and OpenRLHF; never above
    `ratio_outside_fraction`.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that starts the epochs, nats.
        advantages: Advantages of the same tokens.
        mask: True where a token counts.
        clip_low: As in `clipped_surrogate`.
        clip_high: As in `clipped_surrogate`.

    Returns:
        A fraction.

    Raises:
        ValueError: Nothing counts.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return masked_mean((-advantages * clipped > -advantages * ratio).to(ratio.dtype), mask)


@torch.no_grad()
def ratio_outside_fraction(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, ""]:
    """Part of the tokens whose ratio left the band, whether or not that cut their gradient.

    The convention of stable-baselines3 and CleanRL.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that starts the epochs, nats.
        mask: True where a token counts.
        clip_low: As in `clipped_surrogate`.
        clip_high: As in `clipped_surrogate`.

    Returns:
        A fraction.

    Raises:
        ValueError: Nothing counts.
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return masked_mean(outside.to(ratio.dtype), mask)


@torch.no_grad()
def value_clip_fraction(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """Part of the tokens where holding the value near its old one gives the larger error.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/train_policy.py.

    Args:
        values: The critic's values now.
        old_values: Its values when the epochs began.
        returns: What the values should be.
        mask: True where a token counts.
        clip: As in `clipped_value_loss`.

    Returns:
        A fraction.

    Raises:
        ValueError: Nothing counts.
    """
    held = values.clamp(old_values - clip, old_values + clip)
    larger = (held - returns).square() > (values - returns).square()
    return masked_mean(larger.to(values.dtype), mask)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    centred: bool = True,
) -> Float[Tensor, ""]:
    """How much of the returns' variance the critic knows: 1 is all, 0 is none, below is worse.

    Args:
        values: The critic's values.
        returns: What they should have been.
        mask: True where a token counts.
        centred: Forgive a constant error, `1 - var(R - V) / var(R)` (stable-baselines3); False
            does not, `1 - mean (R - V)^2 / var(R)` (openai/lm-human-preferences,
            `val/var_explained`).

    Returns:
        A scalar; NaN when the returns do not vary.

    Raises:
        ValueError: Nothing counts.
    """
    spread = masked_var(returns, mask, ddof=0)
    error = returns - values
    left = masked_var(error, mask, ddof=0) if centred else masked_mean(error.square(), mask)
    return torch.where(spread > 0, 1 - left / spread, torch.full_like(spread, torch.nan))


@torch.no_grad()
def pairwise_accuracy(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Part of the pairs ranked as people ranked them; a tie is a miss.

    Args:
        chosen: Scores of the preferred answers.
        rejected: Scores of the others.

    Returns:
        A fraction.

    Raises:
        ValueError: There is no pair.
    """
    return masked_mean((chosen > rejected).to(chosen.dtype), torch.ones_like(chosen).bool())
