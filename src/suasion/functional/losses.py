"""Policy and value losses, element by element.

Nothing here reduces: sum with `masked_sum`, divide once by a count over the whole step. Pass inputs
through `zero_outside` where padding may hold garbage.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suasion.functional.masking import masked_mean


def clipped_surrogate(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
) -> Float[Tensor, "*shape"]:
    """PPO's loss `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, r = exp(new - old).

    Source: Schulman et al. 1707.06347 eq. 7. Unequal bounds: DAPO, 2503.14476 eq. 10. GSPO
    (2507.18071 eq. 5) is this loss on `sequence_mean_logprobs`.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that starts the epochs, nats.
        advantages: Advantages of the same tokens.
        clip_low: How far the ratio may fall below one and still be followed.
        clip_high: How far it may rise above one.
        dual_clip: Where A < 0, bound the loss by `-A * dual_clip` (Ye et al. 1912.09729, with 3);
            None does not.
        log_ratio_clamp: Bound on |new - old| against overflow; OpenRLHF and verl use 20. None
            leaves it alone.

    Returns:
        One loss per element, to be minimised.

    Raises:
        ValueError: `dual_clip` is not above one.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must exceed 1, got {dual_clip}")
    ratio = importance_ratio(logprobs, old_logprobs, log_ratio_clamp=log_ratio_clamp)
    followed = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(followed, clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def importance_ratio(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    *,
    log_ratio_clamp: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Probability under the new policy over that under the old one, `exp(new - old)`.

    Args:
        logprobs: Log-probabilities under the new policy, nats.
        old_logprobs: The same tokens under the old policy, nats.
        log_ratio_clamp: Bound on |new - old|; None leaves it alone.

    Returns:
        Ratios.
    """
    log_ratio = logprobs - old_logprobs
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    return log_ratio.exp()


def clipped_value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, "*shape"]:
    """Half the larger of two squared errors: of the value, and of the value held near its old one.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/train_policy.py:345.

    Args:
        values: The critic's values now.
        old_values: Its values when the epochs began.
        returns: What the values should be.
        clip: How far a value may move from its old one; None is the plain half squared error.

    Returns:
        One loss per element.
    """
    error = (values - returns).square()
    if clip is not None:
        held = values.clamp(old_values - clip, old_values + clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error


def policy_gradient(
    logprobs: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """REINFORCE: `-A log pi`, right for one step on fresh samples.

    Source: Williams 1992, Machine Learning 8, theorem 1.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        advantages: Advantages of the same tokens.

    Returns:
        One loss per element.
    """
    return -advantages * logprobs


def cispo(
    logprobs: Float[Tensor, "*shape"],
    old_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    ratio_max: float,
) -> Float[Tensor, "*shape"]:
    """REINFORCE weighed by a bounded, constant ratio: `-min(r, ratio_max) A log pi`.

    A clipped token keeps a gradient, unlike in PPO. Source: MiniMax-M1, 2506.13585 eq. 4.

    Args:
        logprobs: Log-probabilities under the policy being trained, nats.
        old_logprobs: The same tokens under the policy that starts the epochs, nats.
        advantages: Advantages of the same tokens.
        ratio_max: Largest weight, an absolute bound on the ratio.

    Returns:
        One loss per element.
    """
    weight = importance_ratio(logprobs, old_logprobs).detach().clamp(max=ratio_max)
    return -weight * advantages * logprobs


def sequence_mean_logprobs(
    logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Length-normalised log-probability of each answer, nats per token.

    The difference of two of these is the log of GSPO's sequence ratio (2507.18071 eq. 7).

    Args:
        logprobs: Log-probabilities per token, nats.
        mask: True at the answer's tokens.

    Returns:
        One value per answer.

    Raises:
        ValueError: An answer has no token.
    """
    return masked_mean(logprobs, mask, dim=1)


def entropy_bonus(entropy: Float[Tensor, "*shape"], *, coef: float) -> Float[Tensor, "*shape"]:
    """What to add to a loss so that entropy is sought: `-coef * entropy`.

    Args:
        entropy: Entropies, nats.
        coef: Loss units per nat.

    Returns:
        One value per element.
    """
    return -coef * entropy


def truncated_importance_weights(
    logprobs: Float[Tensor, "*shape"],
    rollout_logprobs: Float[Tensor, "*shape"],
    *,
    cap: float = 2.0,
) -> Float[Tensor, "*shape"]:
    """Constant weights `min(pi_train / pi_rollout, cap)` against a sampler unlike the trainer.

    Multiply a loss with them. Source: F. Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training" (TIS).

    Args:
        logprobs: The old policy's log-probabilities as the trainer computes them, nats.
        rollout_logprobs: Those the sampler reported, nats.
        cap: Largest weight.

    Returns:
        Weights without gradient.
    """
    return importance_ratio(logprobs, rollout_logprobs).detach().clamp(max=cap)


def icepop_weights(
    logprobs: Float[Tensor, "*shape"],
    rollout_logprobs: Float[Tensor, "*shape"],
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> Float[Tensor, "*shape"]:
    """Constant weights `pi_train / pi_rollout` inside a band, zero outside it.

    Source: Ling team 2025, Ring-1T, 2510.18855, IcePop.

    Args:
        logprobs: The old policy's log-probabilities as the trainer computes them, nats.
        rollout_logprobs: Those the sampler reported, nats.
        low: Smallest ratio that counts.
        high: Largest ratio that counts.

    Returns:
        Weights without gradient.
    """
    ratio = importance_ratio(logprobs, rollout_logprobs).detach()
    inside = (ratio >= low) & (ratio <= high)
    return torch.where(inside, ratio, torch.zeros_like(ratio))
