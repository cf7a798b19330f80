"""Estimators of the divergence from a reference model, and controllers of its coefficient.

All take log-probabilities of tokens *sampled from the policy* and estimate KL(policy || reference)
in nats per token, with d = logprobs - ref_logprobs. Where one is put decides what is optimised:

* in the reward, only `k1` is right: its expected score-function gradient is the gradient of the
  KL, so training ends at the optimum reference * exp(reward / coef). `k2`, `k3` and
  `absolute_difference` in the reward never *pay* a token for having become rarer; at a fixed
  coefficient they let the policy collapse to the greedy answer;
* in the loss, `k2` has the gradient of the KL (per token, blind to the KL of later tokens);
  `k3` follows the gradient of the forward KL and ends elsewhere; `k1` has expected gradient zero
  and regularises nothing.

Estimators: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html;
placements: arXiv 2506.09477.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def k1(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The unbiased estimator `d`. Put it in the reward; in the loss it does nothing.

    Summed over an answer's tokens it estimates the KL of whole answers.
    Source: Ziegler et al. 1909.08593 eq. 2.

    Args:
        logprobs: Policy log-probabilities of the sampled tokens, nats.
        ref_logprobs: Reference log-probabilities of the same tokens, nats.

    Returns:
        One estimate per token, of either sign.
    """
    return logprobs - ref_logprobs


def k2(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The estimator `d^2 / 2`, biased and never negative. Put it in the loss.

    Its gradient on samples of the policy is the gradient of KL(policy || reference); in the reward
    that gradient vanishes to leading order near the reference.

    Args:
        logprobs: Policy log-probabilities of the sampled tokens, nats.
        ref_logprobs: Reference log-probabilities of the same tokens, nats.

    Returns:
        One estimate per token.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(
    logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    *,
    log_ratio_clamp: float | None = None,
) -> Float[Tensor, "*shape"]:
    """The estimator `exp(-d) - 1 + d`, unbiased and never negative. Put it in a report.

    In the loss (GRPO, 2402.03300 eq. 4) its gradient is that of the forward KL(reference ||
    policy), so training ends at another optimum than the KL-regularised one.

    Args:
        logprobs: Policy log-probabilities of the sampled tokens, nats.
        ref_logprobs: Reference log-probabilities of the same tokens, nats.
        log_ratio_clamp: Bound on |d|, against overflow; verl@b178a3cd
            verl/trainer/ppo/core_algos.py uses 20. None leaves d alone.

    Returns:
        One estimate per token.
    """
    d = logprobs - ref_logprobs
    if log_ratio_clamp is not None:
        d = d.clamp(-log_ratio_clamp, log_ratio_clamp)
    return torch.expm1(-d) + d


def absolute_difference(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The distance `|d|`; an estimate of no KL, kept for comparison with older runs.

    In the reward it collapses (see the module). Source: huggingface/trl@v0.11.4
    trl/trainer/ppo_trainer.py, `kl_penalty="abs"`.

    Args:
        logprobs: Policy log-probabilities of the sampled tokens, nats.
        ref_logprobs: Reference log-probabilities of the same tokens, nats.

    Returns:
        One value per token.
    """
    return (logprobs - ref_logprobs).abs()


def full_kl(
    logits: Float[Tensor, "*shape V"],
    ref_logits: Float[Tensor, "*shape V"],
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """KL(policy || reference) summed over the whole vocabulary, without sampling error.

    In the loss its gradient is exact per token; in the reward it does not depend on the sampled
    token, so it tells nothing about which token was better, only about where the policy has gone.

    Args:
        logits: The policy's scores over the vocabulary.
        ref_logits: The reference's scores over the vocabulary.
        temperature: The sampling temperature, applied to both.

    Returns:
        One KL per position, nats.

    Raises:
        ValueError: The temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logp = torch.log_softmax(logits / temperature, dim=-1)
    ref_logp = torch.log_softmax(ref_logits / temperature, dim=-1)
    # A token the policy forbids adds nothing, even where the reference forbids it too.
    gap = (logp - ref_logp).masked_fill(logp == -torch.inf, 0.0)
    return (logp.exp() * gap).sum(-1)


def with_gradient_of(
    value: Float[Tensor, "*shape"], surrogate: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """One tensor's value with another's gradient (straight-through).

    `with_gradient_of(k3(p, q), k2(p, q))` reports the better estimate and follows the right
    gradient, the "k3+" of verl@b178a3cd verl/trainer/ppo/core_algos.py.

    Args:
        value: What the result is.
        surrogate: What the result is differentiated as.

    Returns:
        `value`, with the gradient of `surrogate`.
    """
    return value.detach() + surrogate - surrogate.detach()


def fixed_kl_coef(coef: float, observed_kl: float) -> float:
    """Keep the coefficient; the controller that does not control.

    Args:
        coef: The coefficient in use.
        observed_kl: Ignored.

    Returns:
        `coef`.
    """
    del observed_kl
    return coef


def adaptive_kl_coef(
    coef: float, observed_kl: float, *, target: float, n: int, horizon: float, clip: float = 0.2
) -> float:
    """Proportional controller in log space, `coef * (1 + clip(kl/target - 1) * n / horizon)`.

    Source: openai/lm-human-preferences@cbfd210b lm_human_preferences/train_policy.py:107.

    Args:
        coef: The coefficient in use.
        observed_kl: Mean over answers of the summed k1, nats per answer; may be negative.
        target: The KL to settle at, nats per answer.
        n: Answers since the last update of the coefficient.
        horizon: Answers over which a full error changes the coefficient about e-fold.
        clip: Bound on the relative error.

    Returns:
        The coefficient to use next.

    Raises:
        ValueError: The observed KL is not finite, or target or horizon is not positive.
    """
    if horizon <= 0:
        raise ValueError(f"horizon must be positive, got {horizon}")
    return coef * (1 + _proportional_error(observed_kl, target, clip) * n / horizon)


def paper_kl_coef(
    coef: float, observed_kl: float, *, target: float, gain: float = 0.1, clip: float = 0.2
) -> float:
    """The controller as printed, `coef * (1 + gain * clip(kl/target - 1))`.

    The published code replaces the gain by batch size over horizon (`adaptive_kl_coef`).
    Source: Ziegler et al. 1909.08593 section 2.2, K_beta.

    Args:
        coef: The coefficient in use.
        observed_kl: Mean over answers of the summed k1, nats per answer; may be negative.
        target: The KL to settle at, nats per answer.
        gain: K_beta.
        clip: Bound on the relative error.

    Returns:
        The coefficient to use next.

    Raises:
        ValueError: The observed KL is not finite, or target is not positive.
    """
    return coef * (1 + gain * _proportional_error(observed_kl, target, clip))


def linear_kl_coef(start: float, end: float, progress: float) -> float:
    """Interpolate the coefficient over a run, whatever the KL does.

    Args:
        start: The coefficient at progress zero.
        end: The coefficient at progress one.
        progress: Part of the run that is over; held inside 0..1.

    Returns:
        The coefficient to use now.
    """
    done = min(max(progress, 0.0), 1.0)
    return start + (end - start) * done


def _proportional_error(observed_kl: float, target: float, clip: float) -> float:
    if not math.isfinite(observed_kl):
        raise ValueError(f"observed_kl must be finite, got {observed_kl}")
    if target <= 0:
        raise ValueError(f"target must be positive, got {target}")
    return min(max(observed_kl / target - 1, -clip), clip)
