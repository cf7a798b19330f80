"""How much better than expected an action was: with a critic (GAE) and without one.

The critic-free functions take scores as `[prompts, answers]`: a row holds the answers to one
prompt. References lay the flat batch out in two ways, prompts tiled or answers contiguous, and
mixing them compares answers to different prompts without any error; a matrix cannot be mixed up.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from suasion.functional.masking import whiten, zero_outside


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float | Float[Tensor, " B"] = 0.95,
    lam_critic: float | Float[Tensor, " B"] | None = None,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimation over the counted tokens.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_l (gamma lam)^l delta_{t+l}; t+1 is the next
    *counted* token, so tokens the policy did not choose (padding, a tool's output) take no time,
    and their rewards and values are never read. Returns are advantages plus values, unwhitened.
    Source: Schulman et al. 1506.02438 eq. 16.

    Args:
        rewards: Rewards per token.
        values: The critic's values, at the position that predicts each token.
        mask: True at the tokens the policy chose.
        gamma: Discount per token.
        lam: Mixing of n-step estimates, one for all or one per row (`length_adaptive_lam`).
        lam_critic: Another mixing for the returns (VC-PPO, 2503.01491: 1 for the critic); None
            uses `lam`.
        bootstrap: Value after the last token of each row; None means the answer is over (0).

    Returns:
        Advantages and returns, both zero outside the mask.
    """
    advantages = _discounted_deltas(rewards, values, mask, gamma, lam, bootstrap)
    if lam_critic is None:
        targets = advantages
    else:
        targets = _discounted_deltas(rewards, values, mask, gamma, lam_critic, bootstrap)
    return advantages, zero_outside(targets + values, mask)


def _discounted_deltas(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    bootstrap: Tensor | None,
) -> Tensor:
    next_value = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap
    carry = torch.zeros_like(next_value)
    columns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        chosen = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carry = torch.where(chosen, delta + gamma * lam * carry, carry)
        next_value = torch.where(chosen, values[:, t], next_value)
        columns.append(carry)
    return zero_outside(torch.stack(columns[::-1], dim=1), mask)


def length_adaptive_lam(lengths: Int[Tensor, " B"], *, alpha: float = 0.05) -> Float[Tensor, " B"]:
    """A mixing per answer that reaches as far as the answer is long, `1 - 1 / (alpha * length)`.

    Short answers would get a negative value; they get 0. Source: VAPO, 2504.05118, section on
    length-adaptive GAE.

    Args:
        lengths: Tokens per answer.
        alpha: Part of the answer over which an advantage looks ahead.

    Returns:
        One `lam` per answer.
    """
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


def rewards_to_go(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """Discounted sum of this and all later rewards: the return REINFORCE weighs a token with.

    Args:
        rewards: Rewards per token.
        mask: True at the tokens the policy chose.
        gamma: Discount per counted token.

    Returns:
        Returns, zero outside the mask.
    """
    return _discounted_deltas(rewards, torch.zeros_like(rewards), mask, gamma, 1.0, None)


def per_token(advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Give every token of an answer the answer's advantage.

    Args:
        advantages: One per answer.
        mask: True at the answer's tokens.

    Returns:
        Advantages per token, zero outside the mask.
    """
    return zero_outside(advantages[:, None].expand(mask.shape), mask)


def leave_one_out_baseline(
    scores: Float[Tensor, "P K"], mask: Bool[Tensor, "P K"] | None = None
) -> Float[Tensor, "P K"]:
    """Mean score of the other answers to the same prompt.

    Args:
        scores: Scores by prompt and answer.
        mask: True where an answer may serve in baselines; None admits all. An answer left out
            still has a baseline.

    Returns:
        One baseline per answer.

    Raises:
        ValueError: An answer has no other to be compared with.
    """
    admitted = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    others = admitted.sum(dim=1, keepdim=True) - admitted.long()
    if bool((others == 0).any()):
        raise ValueError("leave-one-out needs two admitted answers to every prompt")
    kept = zero_outside(scores, admitted)
    return (kept.sum(dim=1, keepdim=True) - kept) / others


def leave_one_out(scores: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """RLOO: a score less the mean of the other answers' scores.

    Equals `K / (K - 1)` times the score less the group's mean. TRL takes the summed KL penalty off
    the scores beforehand; do so for its RLOO. Source: Ahmadian et al. 2402.14740.

    Args:
        scores: Scores by prompt and answer.

    Returns:
        One advantage per answer.

    Raises:
        ValueError: A prompt has one answer only.
    """
    return scores - leave_one_out_baseline(scores)


def group_centred(scores: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Dr. GRPO: a score less its group's mean, not divided by anything.

    Source: Liu et al. 2503.20783 section 3.2.

    Args:
        scores: Scores by prompt and answer.

    Returns:
        One advantage per answer.
    """
    return scores - scores.mean(dim=1, keepdim=True)


def group_relative(
    scores: Float[Tensor, "P K"], *, ddof: int = 1, eps: float = 1e-4
) -> Float[Tensor, "P K"]:
    """GRPO: a score in standard deviations of its group, `(r - mean) / (std + eps)`.

    Source: Shao et al. 2402.03300 section 4.1.2, which gives neither constant. All known code takes
    ddof 1; eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF.

    Args:
        scores: Scores by prompt and answer.
        ddof: 0 for the biased standard deviation, 1 for the unbiased one.
        eps: Added to the standard deviation.

    Returns:
        One advantage per answer; zeros for a group whose scores are equal.

    Raises:
        ValueError: A group has no more than `ddof` answers.
    """
    if scores.shape[1] <= ddof:
        raise ValueError(f"ddof={ddof} needs over {ddof} answers a prompt, got {scores.shape[1]}")
    return group_centred(scores) / (scores.std(dim=1, keepdim=True, correction=ddof) + eps)


def group_centred_batch_scaled(
    scores: Float[Tensor, "P K"], *, ddof: int = 1, eps: float = 1e-4
) -> Float[Tensor, "P K"]:
    """A score less its group's mean, in standard deviations of the whole batch of scores.

    Easy and hard prompts then keep their weight. Source: huggingface/trl@f2cd5771
    trl/trainer/grpo_trainer.py, `scale_rewards="batch"`.

    Args:
        scores: Scores by prompt and answer.
        ddof: 0 for the biased standard deviation, 1 for the unbiased one.
        eps: Added to the standard deviation.

    Returns:
        One advantage per answer.

    Raises:
        ValueError: The batch has no more than `ddof` answers.
    """
    if scores.numel() <= ddof:
        raise ValueError(f"ddof={ddof} needs over {ddof} answers, got {scores.numel()}")
    return group_centred(scores) / (scores.std(correction=ddof) + eps)


def batch_standardised(
    advantages: Float[Tensor, "*shape"], *, ddof: int = 1, eps: float = 1e-4
) -> Float[Tensor, "*shape"]:
    """Advantages in standard deviations of the batch, `(a - mean) / (std + eps)`.

    Source: huggingface/trl@f2cd5771 trl/trainer/rloo_trainer.py, `normalize_advantages`, after
    `leave_one_out`.

    Args:
        advantages: One per answer.
        ddof: 0 for the biased standard deviation, 1 for the unbiased one.
        eps: Added to the standard deviation.

    Returns:
        Standardised advantages.

    Raises:
        ValueError: The batch has no more than `ddof` answers.
    """
    if advantages.numel() <= ddof:
        raise ValueError(f"ddof={ddof} needs over {ddof} answers, got {advantages.numel()}")
    return (advantages - advantages.mean()) / (advantages.std(correction=ddof) + eps)


def reinforce_plus_plus(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    ddof: int = 0,
    eps: float = 1e-8,
) -> Float[Tensor, "B T"]:
    """REINFORCE++: returns per token, whitened over every counted token of the batch.

    Source: Hu 2501.03262. For its "-baseline" variant put `group_centred` scores on the last tokens
    first.

    Args:
        rewards: Rewards per token, KL penalty included.
        mask: True at the tokens the policy chose.
        gamma: Discount per counted token.
        ddof: 0 for the biased variance, 1 for the unbiased one.
        eps: Added to the variance.

    Returns:
        Advantages, zero outside the mask.

    Raises:
        ValueError: No more than `ddof` tokens count.
    """
    return whiten(rewards_to_go(rewards, mask, gamma=gamma), mask, ddof=ddof, eps=eps)
