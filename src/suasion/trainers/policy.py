"""The policy update: several epochs of clipped steps over one iteration's experience.

The trainer knows nothing of where responses and scores come from. It takes an `Experience`, makes
its optimizer steps, and returns what happened.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from suasion.functional import statistics
from suasion.functional.masking import masked_sum, whiten
from suasion.models.roles import Critic, Policy
from suasion.rollout.experience import Experience, token_budget

STOP_FACTOR = 1.5
"""Updates stop when the policy moved by this many times `kl_stop` (huggingface/trl@v0.11.4
trl/trainer/ppo_trainer.py, `_early_stop`)."""

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprobs, old_logprobs, advantages), all [N] -> loss per token [N]."""
ValueLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(values, old_values, returns), all [N] -> loss per token [N]."""
Observer = Callable[[dict[str, Tensor]], None]
"""Sees each mini-batch's values per token by name, all [N]: advantages, new, old, returns, ..."""
SumOverRanks = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes; each of them calls it equally often, in the same order."""


def one_rank(tensor: Tensor) -> Tensor:
    """The sum over a single process."""
    return tensor


@dataclass(frozen=True)
class UpdateSettings:
    """The numbers of the update."""

    epochs: int
    """Times over the experience."""
    mini_batch_size: int
    """Responses per optimizer step."""
    micro_batch_tokens: int
    """Most tokens, padding included, per forward and backward pass."""
    max_grad_norm: float
    """Gradients are scaled down to this norm."""
    value_coef: float
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    clip: float = 0.2
    """Clip range of the ratio, for the statistics; the loss has its own."""
    value_clip: float | None = 0.2
    """Clip range of the values, for the statistics."""
    whiten_mini_batches: bool = False
    """Whiten advantages within each mini-batch."""
    kl_stop: float | None = None
    """Stop the iteration's updates when the mean log-ratio exceeds this by half, nats."""
    ratio_limit: float = 10.0
    """A mini-batch whose mean probability ratio is above this makes no step: something is broken,
    or one token's probability exploded (huggingface/trl@v0.11.4, `ratio_threshold`)."""


@dataclass
class _Sums:
    """Token sums of one mini-batch, gathered over its micro-batches."""

    tokens: int
    """Of this process."""
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value.detach().float())

    def all(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])

    def mean(self, name: str) -> float:
        return float(self.all(name).sum() / self.tokens)


class PolicyTrainer:
    """Makes PPO's optimizer steps.

    Args:
        policy: The model that learns.
        critic: Learns beside it, on its trunk or apart.
        optimizer: Over the parameters of both.
        schedule: Its learning-rate schedule; stepped once per iteration.
        policy_loss: Usually the clipped surrogate with its range bound.
        value_loss: Usually the clipped value loss with its range bound.
        settings: The numbers.
        pad_id: Fills batches.
        autocast: Gives the context of each forward pass, for reduced precision.
        sum_over_ranks: Adds up over processes, each of which has its own experience of equally many
            responses; gradients are then those of all their tokens together.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        policy_loss: PolicyLoss,
        value_loss: ValueLoss,
        settings: UpdateSettings,
        *,
        pad_id: int,
        autocast: Callable[[], Any],
        sum_over_ranks: SumOverRanks = one_rank,
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.optimizer = optimizer
        self.schedule = schedule
        self.policy_loss = policy_loss
        self.value_loss = value_loss
        self.settings = settings
        self.pad_id = pad_id
        self.autocast = autocast
        self.sum_over_ranks = sum_over_ranks

    def optimise(
        self,
        experience: Experience,
        generator: torch.Generator,
        *,
        critic_only: bool = False,
        observe: Observer | None = None,
    ) -> dict[str, float]:
        """Train on one iteration's experience.

        Args:
            experience: Responses with advantages and returns.
            generator: Draws the mini-batches.
            critic_only: Leave the policy as it is (the critic's warm-up).
            observe: Called once per mini-batch, after its backward pass.

        Returns:
            Means over the mini-batches of the published `ppo/...` statistics.
        """
        rows_of_steps: list[dict[str, float]] = []
        stopped = False
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(experience), generator=generator).tolist()
            for start in range(0, len(order), self.settings.mini_batch_size):
                rows = order[start : start + self.settings.mini_batch_size]
                stats = self._step(experience, rows, observe, critic_only=critic_only)
                rows_of_steps.append(stats)
                limit = self.settings.kl_stop
                stopped = limit is not None and stats["ppo/policy/policykl"] > STOP_FACTOR * limit
                if stopped:
                    break
            if stopped:
                break
        self.schedule.step()
        means = {
            name: sum(row[name] for row in rows_of_steps) / len(rows_of_steps)
            for name in rows_of_steps[0]
        }
        first = rows_of_steps[0]
        means["ppo/policy/first_ratio_error"] = first["ppo/policy/ratio_error"]
        means["ppo/policy/first_approxkl"] = first["ppo/policy/approxkl"]
        means["ppo/updates"] = float(len(rows_of_steps))
        means["ppo/stopped_early"] = float(stopped)
        return means

    def _step(
        self,
        experience: Experience,
        rows: Sequence[int],
        observe: Observer | None,
        *,
        critic_only: bool,
    ) -> dict[str, float]:
        """One optimizer step on `rows`, in micro-batches with one common normaliser."""
        s = self.settings
        advantages = experience.advantages[list(rows)]
        mask = experience.mask[list(rows)]
        if s.whiten_mini_batches:
            advantages = whiten(advantages, mask)
        position = {row: at for at, row in enumerate(rows)}
        sums = _Sums(int(mask.sum()))
        tokens = int(self.sum_over_ranks(mask.sum()))
        self.optimizer.zero_grad(set_to_none=True)
        for part in token_budget(experience.lengths, s.micro_batch_tokens, rows):
            at = [position[row] for row in part]
            loss = self._micro_loss(experience, part, advantages[at], sums, critic_only=critic_only)
            (loss / tokens).backward()
        stats = self._statistics(sums)
        if observe is not None:
            observe({name: sums.all(name) for name in sums.parts})
        # The processes decide together, or their weights part for ever.
        deciding = ("ppo/policy/policykl", "ppo/policy/ratio")
        summed = mask.new_tensor([stats[k] * sums.tokens for k in deciding], dtype=torch.float64)
        stats |= zip(deciding, (self.sum_over_ranks(summed) / tokens).tolist(), strict=True)
        too_far = s.kl_stop is not None and stats["ppo/policy/policykl"] > STOP_FACTOR * s.kl_stop
        broken = stats["ppo/policy/ratio"] > s.ratio_limit
        stats["ppo/skipped"] = float(too_far or broken)
        stats["ppo/grad_norm"] = self._apply(skip=too_far or broken)
        return stats

    def _micro_loss(
        self,
        experience: Experience,
        rows: list[int],
        advantages: Tensor,
        sums: _Sums,
        *,
        critic_only: bool,
    ) -> Tensor:
        """Summed loss of a micro-batch."""
        s = self.settings
        mask = experience.mask[rows]
        old, old_values = experience.logprobs[rows][mask], experience.values[rows][mask]
        returns, gains = experience.returns[rows][mask], advantages[mask]
        batch = experience.batch(rows, self.pad_id).to(mask.device)
        with self.autocast():
            new, entropy, hidden = self.policy.logprobs(batch, with_entropy=True)
            values = self.critic.values(batch, hidden.detach() if critic_only else hidden).float()
        assert entropy is not None
        policy_loss = self.policy_loss(new, old, gains)
        value_loss = self.value_loss(values, old_values, returns)
        sums.add(
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropy,
            new=new,
            old=old,
            advantages=gains,
            values=values,
            old_values=old_values,
            returns=returns,
        )
        everything = torch.ones_like(new, dtype=torch.bool)
        loss = s.value_coef * masked_sum(value_loss, everything)
        if critic_only:
            return loss
        loss = loss + masked_sum(policy_loss, everything)
        return loss - s.entropy_coef * masked_sum(entropy, everything) if s.entropy_coef else loss

    def _apply(self, *, skip: bool) -> float:
        """Clip and step; the policy's and a separate critic's gradients are clipped apart."""
        groups = [list(self.policy.model.parameters())]
        if self.critic.on_trunk:
            groups[0] += list(self.critic.module.parameters())
        else:
            groups.append(list(self.critic.module.parameters()))
        for parameter in itertools.chain(*groups):
            if parameter.grad is not None:
                parameter.grad = self.sum_over_ranks(parameter.grad)
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group, self.settings.max_grad_norm))
            for group in groups
        ]
        if skip:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.optimizer.step()
        return norms[0]

    def _statistics(self, sums: _Sums) -> dict[str, float]:
        """Statistics of one mini-batch under their published names."""
        s = self.settings
        new, old, gains = sums.all("new"), sums.all("old"), sums.all("advantages")
        values, old_values, returns = (
            sums.all("values"),
            sums.all("old_values"),
            sums.all("returns"),
        )
        mask = torch.ones_like(new, dtype=torch.bool)
        ratio = (new - old).exp()
        policy_loss, value_loss = sums.mean("policy_loss"), sums.mean("value_loss")
        entropy = sums.mean("entropy")
        value_clipfrac = (
            float(
                statistics.value_clip_fraction(values, old_values, returns, mask, clip=s.value_clip)
            )
            if s.value_clip
            else 0.0
        )
        return {
            "ppo/loss/policy": policy_loss,
            "ppo/loss/value": value_loss,
            "ppo/loss/total": policy_loss + s.value_coef * value_loss - s.entropy_coef * entropy,
            "ppo/policy/entropy": entropy,
            "ppo/policy/approxkl": float(statistics.approx_kl_k2(new, old, mask)),
            "ppo/policy/policykl": float(statistics.policy_kl(new, old, mask)),
            "ppo/policy/clipfrac": float(
                statistics.clip_fraction(new, old, gains, mask, clip_low=s.clip, clip_high=s.clip)
            ),
            "ppo/policy/ratio": float(ratio.mean()),
            "ppo/policy/ratio_error": float((ratio - 1).abs().max()),
            "ppo/policy/advantages_mean": float(gains.mean()),
            "ppo/returns/mean": float(returns.mean()),
            "ppo/returns/var": float(returns.var(unbiased=False)),
            "ppo/val/vpred": float(values.mean()),
            "ppo/val/error": float(((values - returns) ** 2).mean()),
            "ppo/val/clipfrac": value_clipfrac,
            "ppo/val/mean": float(old_values.mean()),
            "ppo/val/var": float(old_values.var(unbiased=False)),
            "ppo/val/var_explained": _explained(values, returns, mask),
        }


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Explained variance; 0 where no return differs from another and there is none to explain."""
    if not bool((returns != returns[0]).any()):
        return 0.0
    return float(statistics.explained_variance(values, returns, mask))
