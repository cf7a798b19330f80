"""Checks on one update that steps nowhere: is the ratio one, and where do gradients arrive?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from suasion.core.seeding import generator
from suasion.functional.advantages import gae
from suasion.rollout.experience import build_experience
from suasion.trainers.policy import PolicyTrainer
from suasion.watch.finding import Finding
from suasion.watch.subject import Subject


@dataclass(frozen=True)
class DryUpdate:
    """What an update did that made no step."""

    statistics: dict[str, float]
    """As the trainer returns them."""
    gradients: dict[int, float]
    """Norm of each parameter's gradient, by the parameter's `id`; absent where there was none."""


def dry_update(subject: Subject) -> DryUpdate:
    """One mini-batch of the run's own update with an optimizer that keeps still.

    The scores are drawn at random, so that nothing here depends on the reward.
    """
    p = subject.parts
    scores = torch.randn(len(subject.rollout), generator=generator(subject.seed, "checks", "dry"))
    with p.trainer.autocast():
        experience = build_experience(
            subject.rollout,
            scores,
            policy=p.policy,
            reference=p.reference,
            critic=p.critic,
            estimate=partial(gae, gamma=1.0, lam=0.95),
            kl_coef=0.1,
            whiten_advantages=True,
            pad_id=p.codec.pad_id,
            batch_tokens=p.trainer.settings.micro_batch_tokens,
        )
    every = [each for module in subject.modules.values() for each in module.parameters()]
    held = _Held(list(dict.fromkeys(every)))  # a critic on the policy's base is in both
    settings = replace(
        p.trainer.settings,
        epochs=1,
        mini_batch_size=len(experience),
        kl_stop=None,
        ratio_limit=math.inf,
    )
    trainer = PolicyTrainer(
        p.policy,
        p.critic,
        held,
        _Still(),
        p.trainer.policy_loss,
        p.trainer.value_loss,
        settings,
        pad_id=p.trainer.pad_id,
        autocast=p.trainer.autocast,
    )
    statistics = trainer.optimise(experience, generator(subject.seed, "checks", "mini-batch"))
    held.zero_grad(set_to_none=True)
    return DryUpdate(statistics, held.gradients)


def ratio(subject: Subject) -> Finding:
    """The first probability ratio is 1 and the approximate KL 0, before any step."""
    found = dry_update(subject).statistics
    error, kl = found["ppo/policy/first_ratio_error"], found["ppo/policy/first_approxkl"]
    tolerance = subject.tolerance()
    most, most_kl = math.expm1(tolerance.largest), 0.5 * tolerance.rms**2
    return Finding(
        "ratio",
        ok=error <= most and kl <= most_kl,
        measured={
            "ratio_error": error,
            "tolerance": most,
            "approxkl": kl,
            "approxkl_tolerance": most_kl,
        },
        what=f"before any step the probability ratio is off 1 by {error:.2g}, the approximate KL "
        f"is {kl:.2g}: the update would correct for a change that never happened",
        likely_cause="dropout that is on in one of the two, another temperature, or position ids "
        "or padding that differ between rollout and update",
        fix="switch dropout off and run the checks modes, padding and sampler, which tell apart "
        "what differs",
    )


def gradients(subject: Subject) -> Finding:
    """Each parameter that is to learn gets a gradient, and no other one does."""
    parameters = {
        f"{part}.{name}": each
        for part, module in subject.modules.items()
        for name, each in module.named_parameters()
    }
    given = subject.parts.trainer.optimizer.param_groups
    optimised = {id(each) for group in given for each in group["params"]}
    with subject.nudged():
        norms = dry_update(subject).gradients
    dead = _named(parameters, lambda e: id(e) in optimised and not norms.get(id(e), 0.0))
    broken = _named(parameters, lambda e: not math.isfinite(norms.get(id(e), 0.0)))
    stray = _named(
        parameters, lambda e: id(e) not in optimised and (id(e) in norms or e.requires_grad)
    )
    problems = [
        f"{len(names)} {said} ({names[0]} for one)"
        for names, said in (
            (dead, "that should learn get no gradient"),
            (broken, "get a gradient that is not finite"),
            (stray, "want or get a gradient that no optimizer uses"),
        )
        if names
    ]
    return Finding(
        "gradients",
        ok=not problems,
        measured={
            "learning": len(optimised),
            "without_gradient": len(dead),
            "not_finite": len(broken),
            "outside": len(stray),
        },
        what=f"of {len(parameters)} parameters " + ", ".join(problems),
        likely_cause="an adapter switched or switched off between forward and backward, weights "
        "frozen after the optimizer was built, or quantised layers without a backward pass",
        fix="finish the backward pass of one adapter before switching to another, and build the "
        "optimizer from what is to learn",
    )


def _named(parameters: dict[str, nn.Parameter], which: Callable[[Any], bool]) -> list[str]:
    return [name for name, each in parameters.items() if which(each)]


class _Held(torch.optim.Optimizer):
    """Takes no step; notes the gradients it would have stepped along."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradients: dict[int, float] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Note the norms."""
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    self.gradients[id(each)] = float(each.grad.norm())


class _Still:
    """A schedule that goes nowhere."""

    def step(self) -> None:
        """Do nothing."""
