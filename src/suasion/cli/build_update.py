"""The parts of the policy's update: optimizer, schedule, losses, penalty. Part of `cli.build`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from suasion.config.schema import KlConfig, PpoConfig
from suasion.core.errors import ConfigError
from suasion.functional import kl
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.rollout.experience import Penalty
from suasion.rollout.rewards import load_function
from suasion.trainers import schedules
from suasion.trainers.policy import PolicyLoss, UpdateSettings, ValueLoss

SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": schedules.constant,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
}
"""Schedules with a name of their own."""


FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that make their step in one pass over memory, if told to."""


@dataclass(frozen=True)
class Placement:
    """A way to hold the policy near the reference."""

    estimate: Penalty
    """What the coefficient weighs, per token."""
    optimises: str
    """What a policy trained so ends at, where that is not the maximum of score - beta KL."""


_COLLAPSES = (
    "never pays a token for having become rarer, so that in the long run the policy collapses to "
    "one answer"
)
IN_REWARD = {
    "k1": Placement(kl.k1, ""),
    "abs": Placement(kl.absolute_difference, _COLLAPSES),
    "k2": Placement(kl.k2, _COLLAPSES),
    "k3": Placement(kl.k3, _COLLAPSES),
}
"""Penalties in the reward (functional/kl.py says why)."""
IN_LOSS = {
    "k2": Placement(
        kl.k2, "has the KL's gradient per token, blind to what a token does to later ones"
    ),
    "k3": Placement(
        kl.k3, "follows the gradient of KL(reference || policy), which has another optimum"
    ),
}
"""Penalties in the loss."""


def penalty_of(config: KlConfig) -> Penalty:
    """What the coefficient weighs in the reward."""
    return IN_REWARD[config.estimator].estimate


def loss_penalty_of(config: KlConfig) -> Penalty | None:
    """What it weighs in the loss; None where it is in the reward."""
    return None if config.in_loss is None else IN_LOSS[config.in_loss].estimate


def refuse_conflicts(config: PpoConfig) -> None:
    """Look for options that contradict each other.

    Raises:
        ConfigError: two of them do; names both.
    """
    kl, score, longest = config.kl, config.score, config.response.max_tokens
    if kl.in_loss is not None and kl.estimator != "k1":
        raise ConfigError(
            f"ppo.kl.estimator {kl.estimator} is about a penalty in the reward, and "
            f"ppo.kl.in_loss {kl.in_loss} takes it out of there",
            "leave one of them out",
        )
    if kl.in_loss is not None and config.reference.kind == "none":
        raise ConfigError(
            f"ppo.kl.in_loss {kl.in_loss} holds the policy to a reference, and "
            "ppo.reference.kind is none",
            "leave one of them out",
        )
    if score.overlong is not None and score.overlong > longest:
        raise ConfigError(
            f"ppo.score.overlong {score.overlong} is more than ppo.response.max_tokens {longest}",
            "let scores fall over fewer tokens",
        )


def placement_note(config: KlConfig) -> str | None:
    """What the chosen penalty optimises; None for k1 in the reward, which does what it says."""
    key, where = ("estimator", IN_REWARD[config.estimator])
    if config.in_loss is not None:
        key, where = "in_loss", IN_LOSS[config.in_loss]
    if not where.optimises:
        return None
    return (
        f"ppo.kl.{key} {getattr(config, key)} {where.optimises}; only k1 in the reward, the "
        "default, ends at the maximum of score - coef * KL"
    )


def losses_of(config: PpoConfig) -> tuple[PolicyLoss, ValueLoss]:
    """The policy's and the critic's loss per token."""
    policy_loss = partial(
        clipped_surrogate,
        clip_low=config.clip,
        clip_high=config.clip_high or config.clip,
        dual_clip=config.dual_clip,
    )
    return policy_loss, partial(clipped_value_loss, clip=config.critic.clip)


def optimizer_of(
    config: PpoConfig, policy: list[nn.Parameter], critic: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer over what learns, the critic with its own learning rate.

    Raises:
        ConfigError: it cannot be imported, takes no such options, or is no optimizer.
    """
    rate = config.learning_rate
    groups = [
        {"params": policy, "lr": rate},
        {"params": critic, "lr": config.critic.learning_rate or rate},
    ]
    kind = load_function(config.optimizer)
    check_options("optimizer", config.optimizer, kind, config.optimizer_options, ("params", "lr"))
    options = {**({"fused": True} if kind in FUSED else {}), **config.optimizer_options}
    optimizer = _built("optimizer", partial(kind, groups, lr=rate), options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"ppo.optimizer {config.optimizer} is not a torch optimizer")
    return optimizer


def schedule_of(config: PpoConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The learning rate's schedule, stepped once per iteration.

    Raises:
        ConfigError: there is no such schedule, it takes no such options, or it wants more at a
            step than that it happened.
    """
    name, options = config.schedule, config.schedule_options
    if name in SCHEDULES:
        check_options("schedule", name, SCHEDULES[name], options, ("step", "steps"))
        share = partial(SCHEDULES[name], steps=config.steps, **options)
        _built("schedule", partial(share, 0), {})
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    if ":" not in name:
        close = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"did you mean {close[0]}?" if close else "or package.module:Class"
        raise ConfigError(
            f"ppo.schedule {name}: there is no such schedule", f"{', '.join(SCHEDULES)}; {hint}"
        )
    kind = load_function(name)
    check_options("schedule", name, kind, options, ("optimizer",))
    schedule = _built("schedule", partial(kind, optimizer), options)
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        raise ConfigError(f"ppo.schedule {name} is not a torch learning-rate schedule")
    if any(p.default is p.empty for p in inspect.signature(schedule.step).parameters.values()):
        raise ConfigError(
            f"ppo.schedule {name} wants a measurement at each step",
            "take a schedule that only counts steps",
        )
    return schedule


def check_options(
    key: str,
    path: str,
    kind: Callable[..., Any],
    options: Mapping[str, object],
    taken: tuple[str, ...],
) -> None:
    """Refuse options that `kind` does not take, by name.

    Raises:
        ConfigError: names the key and what is nearest to it.
    """
    parameters = inspect.signature(kind).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    valid = [name for name in parameters if name not in taken]
    for name in options:
        where = f"ppo.{key}_options.{name}"
        if name in taken:
            raise ConfigError(f"{where}: it is set by suasion", "leave it out")
        if name not in valid and not open_ended:
            close = difflib.get_close_matches(name, valid, n=1)
            listed = f"did you mean {close[0]}?" if close else f"it has {', '.join(valid)}"
            raise ConfigError(f"{where}: {path} has no such option", listed)


def _built(key: str, make: Callable[..., Any], options: Mapping[str, object]) -> Any:
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"ppo.{key} or ppo.{key}_options: {error}") from error


def settings_of(config: PpoConfig) -> UpdateSettings:
    """The numbers of the update."""
    return UpdateSettings(
        epochs=config.epochs,
        mini_batch_size=config.mini_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        max_grad_norm=config.max_grad_norm,
        value_coef=config.critic.coef,
        entropy_coef=config.entropy,
        clip=config.clip,
        clip_high=config.clip_high,
        value_clip=config.critic.clip,
        whiten_mini_batches=config.whiten == "mini_batch",
        kl_stop=config.kl.stop,
    )
