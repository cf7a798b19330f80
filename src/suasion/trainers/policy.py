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
from torch import Tensor, nn

from suasion.functional import statistics
from suasion.functional.masking import masked_sum, whiten
from suasion.models.lowrank import adapters_at_once
from suasion.models.roles import Critic, Policy
from suasion.rollout.experience import Experience, Penalty, token_budget

STOP_FACTOR = 1.5
"""Updates stop when the policy moved by this many times `kl_stop` (huggingface/trl@v0.11.4
trl/trainer/ppo_trainer.py, `_early_stop`)."""

ALIKE = 1e-4
"""Returns within this share of their size differ by the rounding of log-probabilities."""

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprobs, old_logprobs, advantages), all [N] -> loss per token [N]."""
ValueLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(values, old_values, returns), all [N] -> loss per token [N]."""
Observer = Callable[[dict[str, Tensor]], None]
"""Sees each mini-batch's values per token by name, all [N]: advantages, new, old, returns, ..."""
SumOverRanks = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes; each of them calls it equally often, in the same order."""
OwnRows = Callable[[Sequence[int]], Sequence[int]]
"""A mini-batch's rows -> those of them that this process works on; may be none."""
AllTokens = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Values per token by name -> the same of all processes, as far as statistics are to see them."""


def one_rank(tensor: Tensor) -> Tensor:
    """The sum over a single process."""
    return tensor


def all_rows(rows: Sequence[int]) -> Sequence[int]:
    """The rows of a process that shares them with no other."""
    return rows


def own_tokens(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics that see what this process did."""
    return tokens


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
    clip_high: float | None = None
    """How far it may rise, where that is not how far it may fall."""
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
class _Seen:
    """Values per token of one mini-batch, gathered over its micro-batches."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts.setdefault(name, []).append(value.detach().float())

    def all(self) -> dict[str, Tensor]:
        return {name: torch.cat(values) for name, values in self.parts.items()}


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
        loss_penalty: A penalty in the loss, weighed by the experience's `loss_kl_coef`.
        sum_over_ranks: Adds up over processes; gradients are then those of all their tokens
            together.
        own_rows: Which rows of a mini-batch this process works on, where the processes have one
            experience together. By default all: each has an experience of its own.
        all_tokens: Gives statistics the values of all processes.
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
        loss_penalty: Penalty | None = None,
        sum_over_ranks: SumOverRanks = one_rank,
        own_rows: OwnRows = all_rows,
        all_tokens: AllTokens = own_tokens,
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
        self.loss_penalty = loss_penalty
        self.sum_over_ranks = sum_over_ranks
        self.own_rows = own_rows
        self.all_tokens = all_tokens

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
        own = self.own_rows(rows)
        seen = _Seen()
        tokens = int(self.sum_over_ranks(experience.mask[list(own)].sum()))
        self.optimizer.zero_grad(set_to_none=True)
        with adapters_at_once(self.policy.model, self.critic.module):
            for part in token_budget(experience.lengths, s.micro_batch_tokens, own):
                gains = advantages[[position[row] for row in part]]
                self._backward(experience, part, gains, seen, tokens, critic_only=critic_only)
        values = self.all_tokens(seen.all())
        stats = self._statistics(values, experience.loss_kl_coef)
        if observe is not None:
            observe(values)
        # The processes decide together, or their weights part for ever.
        deciding = ("ppo/policy/policykl", "ppo/policy/ratio")
        count = len(values["new"])
        summed = mask.new_tensor(
            [*(stats[k] * count for k in deciding), count], dtype=torch.float64
        )
        *sums, counted = self.sum_over_ranks(summed).tolist()
        stats |= {name: total / counted for name, total in zip(deciding, sums, strict=True)}
        too_far = s.kl_stop is not None and stats["ppo/policy/policykl"] > STOP_FACTOR * s.kl_stop
        broken = stats["ppo/policy/ratio"] > s.ratio_limit
        stats["ppo/skipped"] = float(too_far or broken)
        stats["ppo/grad_norm"] = self._apply(skip=too_far or broken)
        return stats

    def _backward(
        self,
        experience: Experience,
        rows: list[int],
        advantages: Tensor,
        seen: _Seen,
        tokens: int,
        *,
        critic_only: bool,
    ) -> None:
        """Gradients of a micro-batch.

        A critic of its own has its turn when the policy's backward pass is done: only one of the
        two has activations at a time, and on a shared base only one may be active.
        """
        s = self.settings
        mask = experience.mask[rows]
        old, old_values = experience.logprobs[rows][mask], experience.values[rows][mask]
        returns, gains = experience.returns[rows][mask], advantages[mask]
        batch = experience.batch(rows, self.pad_id).to(mask.device)
        with self.autocast(), torch.set_grad_enabled(not critic_only):
            new, entropy, hidden = self.policy.logprobs(batch, with_entropy=True)
        assert entropy is not None
        everything = torch.ones_like(new, dtype=torch.bool)
        policy_loss = self.policy_loss(new, old, gains)
        kl_loss = torch.zeros_like(new)
        if self.loss_penalty is not None:
            kl_loss = self.loss_penalty(new, experience.ref_logprobs[rows][mask])
        loss = policy_loss.new_zeros(())
        if not critic_only:
            loss = masked_sum(policy_loss, everything)
            if s.entropy_coef:
                loss = loss - s.entropy_coef * masked_sum(entropy, everything)
            if experience.loss_kl_coef:
                loss = loss + experience.loss_kl_coef * masked_sum(kl_loss, everything)
            if not self.critic.on_trunk:
                (loss / tokens).backward()
                loss, hidden = loss.detach(), hidden.detach()
        with self.critic.turn():
            with self.autocast():
                values = self.critic.values(batch, hidden).float()
            value_loss = self.value_loss(values, old_values, returns)
            loss = loss + s.value_coef * masked_sum(value_loss, everything)
            (loss / tokens).backward()
        seen.add(
            policy_loss=policy_loss,
            value_loss=value_loss,
            kl_loss=kl_loss,
            entropy=entropy,
            new=new,
            old=old,
            advantages=gains,
            values=values,
            old_values=old_values,
            returns=returns,
        )

    def _apply(self, *, skip: bool) -> float:
        """Clip and step; the policy's and a separate critic's gradients are clipped apart."""
        groups = [[parameter for _, parameter in self.policy.trainable()]]
        if self.critic.on_trunk:
            groups[0] += list(self.critic.module.parameters())
        else:
            groups.append(list(self.critic.module.parameters()))
        self._sum_gradients(list(itertools.chain(*groups)))
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group, self.settings.max_grad_norm))
            for group in groups
        ]
        if skip:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.optimizer.step()
        return norms[0]

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients up over the processes, of which one without rows has none of its own.

        What has a gradient nowhere keeps none, so that an optimizer leaves it alone.
        """
        if self.sum_over_ranks is one_rank:
            return
        flags = [float(parameter.grad is not None) for parameter in parameters]
        having = self.sum_over_ranks(torch.tensor(flags, device=self.policy.device)).tolist()
        for parameter, somewhere in zip(parameters, having, strict=True):
            if somewhere:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.sum_over_ranks(own)

    def _statistics(self, seen: dict[str, Tensor], loss_kl_coef: float) -> dict[str, float]:
        """Statistics of one mini-batch under their published names."""
        s = self.settings
        new, old, gains = seen["new"], seen["old"], seen["advantages"]
        values, old_values, returns = seen["values"], seen["old_values"], seen["returns"]
        mask = torch.ones_like(new, dtype=torch.bool)
        ratio = (new - old).exp()
        losses = ("policy_loss", "value_loss", "entropy", "kl_loss")
        policy_loss, value_loss, entropy, kl_loss = (float(seen[name].mean()) for name in losses)
        kl_loss *= loss_kl_coef
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
            "ppo/loss/kl": kl_loss,
            "ppo/loss/total": policy_loss
            + s.value_coef * value_loss
            - s.entropy_coef * entropy
            + kl_loss,
            "ppo/policy/entropy": entropy,
            "ppo/policy/approxkl": float(statistics.approx_kl_k2(new, old, mask)),
            "ppo/policy/policykl": float(statistics.policy_kl(new, old, mask)),
            "ppo/policy/clipfrac": float(
                statistics.clip_fraction(
                    new, old, gains, mask, clip_low=s.clip, clip_high=s.clip_high or s.clip
                )
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
    """Explained variance; 0 where returns are alike and there is none to explain."""
    if float((returns - returns[0]).abs().max()) <= ALIKE * float(returns.abs().max()):
        return 0.0
    return float(statistics.explained_variance(values, returns, mask))
