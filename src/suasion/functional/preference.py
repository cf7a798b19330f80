"""Losses on preferences: for reward models, and for policies trained without one (DPO).

One loss per pair or per prompt, in nats, unreduced.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from suasion.functional.masking import zero_outside


def pairwise_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    margin: float | Float[Tensor, " B"] = 0.0,
    centring: float = 0.0,
) -> Float[Tensor, " B"]:
    """Bradley-Terry: `-log sigmoid(chosen - rejected - margin) + centring (chosen + rejected)^2`.

    Source: Stiennon et al. 2009.01325 section 3.4; margin: Llama 2, 2307.09288 eq. 2; centring:
    Eisenstein et al. 2312.09244, with 0.01.

    Args:
        chosen: Scores of the preferred answers.
        rejected: Scores of the others.
        margin: By how much the scores should differ, score units.
        centring: Pull of the scores towards mean zero.

    Returns:
        One loss per pair.
    """
    return -logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


def k_wise_loss(
    scores: Float[Tensor, "P K"],
    ranks: Int[Tensor, "P K"],
    mask: Bool[Tensor, "P K"] | None = None,
) -> Float[Tensor, " P"]:
    """Mean of the pairwise losses of all ranked pairs of answers to one prompt.

    One prompt's pairs stay together, so that an answer is not trained on once per pair.
    Source: InstructGPT, 2203.02155 eq. 1. Equal ranks say nothing and make no pair.

    Args:
        scores: Scores by prompt and answer.
        ranks: Ranks by prompt and answer, the lower the better.
        mask: True where there is an answer; None when all prompts have K.

    Returns:
        One loss per prompt.

    Raises:
        ValueError: A prompt has no pair of answers with different ranks.
    """
    better = ranks[:, :, None] < ranks[:, None, :]
    if mask is not None:
        better = better & mask[:, :, None] & mask[:, None, :]
        scores = zero_outside(scores, mask)
    pairs = better.sum(dim=(1, 2))
    if bool((pairs == 0).any()):
        rows = torch.nonzero(pairs == 0).flatten().tolist()
        raise ValueError(f"prompts without two differently ranked answers: rows {rows}")
    losses = -logsigmoid(scores[:, :, None] - scores[:, None, :])
    return zero_outside(losses, better).sum(dim=(1, 2)) / pairs


def best_of_n_loss(scores: Float[Tensor, "P N"], best: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Softmax cross-entropy of the answer a person picked out of N.

    With two answers it is `pairwise_loss`. Source: openai/lm-human-preferences@cbfd210b
    lm_human_preferences/label_types.py, PickBest.

    Args:
        scores: Scores by prompt and answer.
        best: Index of the picked answer.

    Returns:
        One loss per prompt.
    """
    return scores.logsumexp(dim=1) - scores.gather(1, best.long()[:, None]).squeeze(1)


def implicit_rewards(
    logprobs: Float[Tensor, " B"], ref_logprobs: Float[Tensor, " B"], *, beta: float
) -> Float[Tensor, " B"]:
    """The reward a policy is optimal for, up to a constant per prompt: `beta log(pi / ref)`.

    Source: Rafailov et al. 2305.18290 eq. 5.

    Args:
        logprobs: Summed log-probabilities of whole answers under the policy, nats.
        ref_logprobs: The same under the reference, nats.
        beta: Score units per nat.

    Returns:
        One reward per answer.
    """
    return beta * (logprobs - ref_logprobs)


def dpo_loss(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """DPO: `-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)`, h = chosen - rejected.

    Source: Rafailov et al. 2305.18290 eq. 7; smoothing: E. Mitchell, "A note on DPO with noisy
    preferences", 2023 (cDPO).

    Args:
        chosen_log_ratio: `log pi - log ref`, summed over the preferred answer, nats.
        rejected_log_ratio: The same over the other answer, nats.
        beta: Inverse strength of the pull to the reference.
        label_smoothing: Assumed part of wrong labels, s.

    Returns:
        One loss per pair.

    Raises:
        ValueError: The smoothing is not in `[0, 0.5)`.
    """
    _check_smoothing(label_smoothing)
    logit = beta * (chosen_log_ratio - rejected_log_ratio)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def robust_dpo_loss(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """DPO whose expectation under flipped labels is the loss of clean ones; may be negative.

    `(-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s)`.
    Source: Chowdhury et al. 2403.00409.

    Args:
        chosen_log_ratio: `log pi - log ref`, summed over the preferred answer, nats.
        rejected_log_ratio: The same over the other answer, nats.
        beta: Inverse strength of the pull to the reference.
        label_smoothing: Assumed part of wrong labels, s.

    Returns:
        One loss per pair.

    Raises:
        ValueError: The smoothing is not in `[0, 0.5)`.
    """
    _check_smoothing(label_smoothing)
    logit = beta * (chosen_log_ratio - rejected_log_ratio)
    right, wrong = logsigmoid(logit), logsigmoid(-logit)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def hinge_dpo_loss(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    """A margin instead of a sigmoid: `max(0, 1 - beta h)`.

    Source: SLiC-HF, 2305.10425, on log-ratios as in huggingface/trl@f2cd5771
    trl/trainer/dpo_trainer.py, `loss_type="hinge"`.

    Args:
        chosen_log_ratio: `log pi - log ref`, summed over the preferred answer, nats.
        rejected_log_ratio: The same over the other answer, nats.
        beta: Inverse of the margin.

    Returns:
        One loss per pair.
    """
    return torch.relu(1 - beta * (chosen_log_ratio - rejected_log_ratio))


def ipo_loss(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    """IPO on whole answers: `(h - 1 / (2 beta))^2`, in nats squared.

    Source: Azar et al. 2310.12036 eq. 17; sums as in eric-mitchell/
    direct-preference-optimization@f8b8c0f4 trainers.py.

    Args:
        chosen_log_ratio: `log pi - log ref`, summed over the preferred answer, nats.
        rejected_log_ratio: The same over the other answer, nats.
        beta: Inverse strength of the pull to the reference.

    Returns:
        One loss per pair.

    Raises:
        ValueError: `beta` is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)).square()


def ipo_loss_per_token(
    chosen_log_ratio: Float[Tensor, " B"],
    rejected_log_ratio: Float[Tensor, " B"],
    chosen_length: Int[Tensor, " B"],
    rejected_length: Int[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    """IPO on log-ratios per token, another loss under the same name.

    Source: huggingface/trl@f2cd5771 trl/trainer/dpo_trainer.py:1434, `loss_type="ipo"`.

    Args:
        chosen_log_ratio: `log pi - log ref`, summed over the preferred answer, nats.
        rejected_log_ratio: The same over the other answer, nats.
        chosen_length: Tokens of the preferred answer.
        rejected_length: Tokens of the other answer.
        beta: Inverse strength of the pull to the reference.

    Returns:
        One loss per pair.

    Raises:
        ValueError: `beta` or a length is not positive.
    """
    if bool((chosen_length < 1).any()) or bool((rejected_length < 1).any()):
        raise ValueError("an answer without tokens has no mean log-ratio")
    return ipo_loss(
        chosen_log_ratio / chosen_length, rejected_log_ratio / rejected_length, beta=beta
    )


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
