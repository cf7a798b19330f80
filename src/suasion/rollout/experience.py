"""From sampled responses and their scores to what the update trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from suasion.core.ranks import ALONE, EachRow
from suasion.core.records import Rollout, TokenBatch, padded, token_batch
from suasion.functional import kl as kl_estimators
from suasion.functional.masking import length_mask, whiten
from suasion.functional.rewards import token_rewards
from suasion.models.references import Reference
from suasion.models.roles import Critic, Policy

Estimate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rewards, values, mask), all [B, R] -> (advantages, returns), both [B, R]."""
Penalty = Callable[[Tensor, Tensor], Tensor]
"""(logprobs, ref_logprobs), both [B, R] -> penalty per token [B, R], nats."""


@dataclass(frozen=True)
class Experience:
    """One iteration's responses with everything the update needs. B responses, R positions."""

    queries: list[list[int]]
    """Prompt tokens."""
    responses: list[list[int]]
    """Response tokens."""
    mask: Tensor
    """True at response tokens that count, bool, [B, R]."""
    logprobs: Tensor
    """Of the policy that sampled them, nats, [B, R]."""
    ref_logprobs: Tensor
    """Of the reference, nats, [B, R]."""
    values: Tensor
    """Of the critic at the time of the rollout, [B, R]."""
    scores: Tensor
    """What each response was worth, after baseline, scale and clip, [B]."""
    rewards: Tensor
    """Score at the last token minus the KL penalty at every token, [B, R]."""
    advantages: Tensor
    """Whitened or not, as asked, [B, R]."""
    returns: Tensor
    """Targets of the critic, [B, R]."""
    kl_coef: float
    """Weight of the penalty inside `rewards`."""
    loss_kl_coef: float = 0.0
    """Weight of the penalty in the loss, where that is its place."""

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, query and response."""
        return [len(q) + len(r) for q, r in zip(self.queries, self.responses, strict=True)]

    def batch(self, rows: Sequence[int], pad_id: int) -> TokenBatch:
        """The sequences of `rows`, padded; only response tokens that count are predicted."""
        batch = token_batch(
            [self.queries[i] for i in rows], [self.responses[i] for i in rows], pad_id
        )
        lengths = torch.tensor([len(self.responses[i]) for i in rows])
        within = length_mask(lengths, self.mask.shape[1])
        batch.predicts[batch.predicts.clone()] = self.mask[list(rows)].cpu()[within]
        return batch


def token_budget(
    lengths: Sequence[int], budget: int, rows: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Group rows of similar length so that rows times longest stays within `budget` tokens.

    A row longer than the budget is a group of its own.
    """
    order = sorted(range(len(lengths)) if rows is None else rows, key=lambda i: -lengths[i])
    while order:
        count = max(1, budget // lengths[order[0]])
        yield order[:count]
        order = order[count:]


@torch.no_grad()
def build_experience(
    rollout: Rollout,
    scores: Tensor,
    *,
    policy: Policy,
    reference: Reference | None,
    critic: Critic,
    estimate: Estimate,
    kl_coef: float,
    whiten_advantages: bool,
    pad_id: int,
    batch_tokens: int,
    penalty: Penalty = kl_estimators.k1,
    counts: Sequence[Tensor] | None = None,
    loss_kl_coef: float = 0.0,
    each_row: EachRow = ALONE.each_row,
) -> Experience:
    """Score each token: reference, values, rewards, advantages.

    What the rollout already knows (its log-probabilities, the values of a critic on the policy's
    trunk) is not computed again. The penalty is k1, `log policy - log reference`, in the reward:
    what optimises score minus beta times KL (arXiv 2506.09477). The other ones are for comparison.

    Args:
        rollout: Sampled responses.
        scores: One per response, [B].
        policy: The model that sampled them.
        reference: What the policy is held to; None for no penalty.
        critic: Estimates returns.
        estimate: Generalised advantage estimation with its constants.
        kl_coef: Weight of the penalty.
        whiten_advantages: Whiten over all response tokens of the batch.
        pad_id: Fills batches.
        batch_tokens: Most tokens in one forward pass.
        penalty: What `kl_coef` weighs.
        counts: For each response, False at tokens the policy did not choose (a tool's output), bool
            [length]; None: it chose all of them.
        loss_kl_coef: Weight of a penalty in the loss, handed on to it.
        each_row: Spreads the forward passes over processes.
    """
    device = policy.device
    logprobs = padded(rollout.logprobs).to(device)
    lengths = torch.tensor([len(response) for response in rollout.responses], device=device)
    mask = length_mask(lengths, logprobs.shape[1])
    known = partial(
        _token_estimates, rollout, policy, reference, critic, pad_id=pad_id, budget=batch_tokens
    )
    with reference.present() if reference else nullcontext():
        found = each_row(len(rollout), known)
    ref_logprobs = padded([of_reference for of_reference, _ in found]).to(device)
    values = padded([of_critic for _, of_critic in found]).to(device)
    if counts is not None:
        mask = mask & padded(counts).bool().to(device)
    penalties = penalty(logprobs, ref_logprobs)
    rewards = token_rewards(scores.to(device), penalties, mask, kl_coef=kl_coef)
    advantages, returns = estimate(rewards, values, mask)
    if whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(
        rollout.queries,
        rollout.responses,
        mask,
        logprobs,
        ref_logprobs,
        values,
        scores.to(device),
        rewards,
        advantages * mask,
        returns * mask,
        kl_coef,
        loss_kl_coef,
    )


def _token_estimates(
    rollout: Rollout,
    policy: Policy,
    reference: Reference | None,
    critic: Critic,
    rows: Sequence[int],
    *,
    pad_id: int,
    budget: int,
) -> list[tuple[Tensor, Tensor]]:
    """For each of `rows` the reference's log-probabilities and the critic's values, [length]."""
    r = rollout
    found = {
        i: (r.logprobs[i], r.values[i] if r.values else torch.zeros_like(r.logprobs[i]))
        for i in rows
    }
    if reference is None and r.values:
        return list(found.values())
    totals = [len(q) + len(a) for q, a in zip(r.queries, r.responses, strict=True)]
    for part in token_budget(totals, budget, rows):
        batch = token_batch([r.queries[i] for i in part], [r.responses[i] for i in part], pad_id)
        batch = batch.to(policy.device)
        lengths = [len(r.responses[i]) for i in part]
        of_reference, of_critic = zip(*(found[i] for i in part), strict=True)
        if reference is not None:
            of_reference = _like(r.logprobs[part[0]], reference.logprobs(batch)).split(lengths)
        if not r.values:
            hidden = policy.logprobs(batch)[2] if critic.on_trunk else torch.empty(0)
            of_critic = _like(r.logprobs[part[0]], critic.values(batch, hidden)).split(lengths)
        found |= zip(part, zip(of_reference, of_critic, strict=True), strict=True)
    return [found[i] for i in rows]


def _like(example: Tensor, found: Tensor) -> Tensor:
    """On the device and in the type of the rollout's own figures."""
    return found.to(example.device, example.dtype)
