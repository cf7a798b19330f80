"""Configuration becomes objects here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from suasion.cli.build_roles import Roles, roles_of, save_roles
from suasion.cli.build_update import (
    loss_penalty_of,
    losses_of,
    optimizer_of,
    penalty_of,
    placement_note,
    refuse_conflicts,
    schedule_of,
    settings_of,
)
from suasion.config.recipe import STAGES
from suasion.config.schema import PpoConfig, Recipe
from suasion.core.errors import ConfigError
from suasion.core.ranks import ALONE, Ranks
from suasion.data.codec import Codec
from suasion.data.sources import Source, fitting, spread
from suasion.models.arithmetic import arithmetic_for, float32_products
from suasion.models.load import (
    context_of,
    device_for_training,
    load_codec,
)
from suasion.models.quantised import hold_rounded
from suasion.models.references import FrozenReference
from suasion.models.roles import Policy, hidden_size_of
from suasion.rollout.rewards import RewardModel
from suasion.trainers.policy import PolicyTrainer, one_rank
from suasion.trainers.ppo import PpoLoop, PpoParts
from suasion.watch.finding import Finding
from suasion.watch.signals import warnings_about
from suasion.watch.subject import subject_of
from suasion.watch.suite import QUICK, run_checks


def ppo(
    config: PpoConfig, folder: Path, *, seed: int, console: Console, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Build the policy stage, check it, run it, and save policy and critic.

    Raises:
        CheckError: a check found a fault, and `checks` is "stop".
    """
    parts = ppo_parts(config, seed=seed, ranks=ranks, folder=folder)
    if config.checks != "off":
        ranks.share(partial(_check_quickly, parts, config, seed, console))
    hold_as_computed(parts)
    for note in parts.notes:
        console.print(f"  {note}", style="yellow", markup=False, highlight=False)
    names = config.track if ranks.first else ()
    with _Trackers(names, folder, parts.policy.device) as trackers:
        loop = PpoLoop(
            parts,
            config,
            folder=folder,
            seed=seed,
            console=console,
            log=trackers.log,
            observe=warnings_about,
            ranks=ranks,
        )
        with float32_products(parts.arithmetic.training):
            result = loop.run()
    kept = {
        **result,
        "prompts": len(parts.queries),
        "critic": config.critic.kind,
        "arithmetic": parts.arithmetic.brief,
    }
    if not ranks.first:
        return kept
    roles = Roles(parts.policy, parts.reference, parts.critic, parts.reward)
    save_roles(folder, roles, parts.codec, config)
    return kept


def hold_as_computed(parts: PpoParts) -> None:
    """Round the frozen models' linear layers once, where the loop would in every pass.

    From then on they compute under the loop's autocast only.
    """
    dtype = getattr(torch, parts.arithmetic.dtype)
    if dtype is torch.float32:
        return
    of_policy = {id(parameter) for parameter in parts.policy.model.parameters()}
    judge = parts.reward.reward
    if isinstance(judge, RewardModel):
        hold_rounded(judge.model, dtype, besides=of_policy)
    if isinstance(parts.reference, FrozenReference):
        parts.reference.hold_rounded(dtype, besides=of_policy)


def _check_quickly(parts: PpoParts, config: PpoConfig, seed: int, console: Console) -> None:
    told = config.checks == "report"
    subject = subject_of(parts, config, seed=seed)
    run_checks(subject, QUICK, console=console, only_report=told, brief=True)


def check(recipe: Recipe, names: Sequence[str], console: Console) -> list[Finding]:
    """Build a recipe's policy stage and check it, without running it.

    Raises:
        CheckError: faults were found, and `ppo.checks` is not "report".
        ConfigError: the recipe has no policy stage, or a name is no check.
        ModelError: a model the stage needs is not there.
    """
    config = recipe.ppo
    if config is None:
        raise ConfigError(f"{recipe.name}: the recipe has no ppo stage to check")
    parts = ppo_parts(config, seed=recipe.seed)
    stages = {name: getattr(recipe, name) for name in STAGES}
    templates = {
        name: stage.template for name, stage in stages.items() if hasattr(stage, "template")
    }
    subject = subject_of(parts, config, seed=recipe.seed, templates=templates)
    return run_checks(subject, names, console=console, only_report=config.checks == "report")


def ppo_parts(
    config: PpoConfig, *, seed: int, ranks: Ranks = ALONE, folder: Path | None = None
) -> PpoParts:
    """The objects of a policy stage.

    Args:
        config: Of the stage.
        seed: Root seed.
        ranks: The processes that train together.
        folder: Of the stage, which keeps the choice of arithmetic; None: choose for this time.

    Raises:
        ConfigError: two settings do not go together.
        ModelError: a model folder cannot be used.
    """
    assert config.model is not None
    refuse_conflicts(config)
    device = device_for_training()
    codec = load_codec(config.model, config.template)
    roles = roles_of(config, codec, device, seed=seed)
    policy, critic = roles.policy, roles.critic
    arithmetic = arithmetic_for(
        config.precision, width=hidden_size_of(policy), device=device, folder=folder, ranks=ranks
    )
    optimizer = optimizer_of(
        config, [p for _, p in policy.trainable()], list(critic.module.parameters())
    )
    policy_loss, value_loss = losses_of(config)
    trainer = PolicyTrainer(
        policy,
        critic,
        optimizer,
        schedule_of(config, optimizer),
        policy_loss,
        value_loss,
        settings_of(config),
        pad_id=codec.pad_id,
        autocast=arithmetic.autocast(device),
        loss_penalty=loss_penalty_of(config.kl),
        sum_over_ranks=ranks.sum if ranks.world > 1 else one_rank,
        own_rows=ranks.own,
        all_tokens=ranks.concatenated,
    )
    queries, fixed = _prompts(config, policy, codec)
    note = placement_note(config.kl)
    return PpoParts(
        policy,
        roles.reference,
        critic,
        trainer,
        roles.reward,
        codec,
        queries,
        fixed,
        penalty_of(config.kl),
        (note,) if note else (),
        arithmetic,
    )


def _prompts(config: PpoConfig, policy: Policy, codec: Codec) -> tuple[list[str], list[str]]:
    """Prompts to learn on, and the fixed ones to watch: held-out ones where there are any."""
    context = context_of(policy.model.config)
    room = min(config.prompt_tokens or context, context - config.response.max_tokens)
    if room < 1:
        raise ConfigError(
            f"ppo.response.max_tokens {config.response.max_tokens} leaves no room for a prompt "
            f"in a context of {context} tokens",
            "shorten the responses",
        )
    source = Source(Path(str(config.data)))
    queries = fitting(source.queries("policy"), codec, room, config.too_long, str(config.data))
    watched = source.queries("evaluation") if source.prepared else queries
    candidates = spread(watched, 4 * config.samples) if config.samples else []
    fits = [q for q in candidates if len(codec.prompt_ids(q)) <= room]
    return queries, fits[: config.samples]


class _Trackers:
    """Experiment trackers through accelerate; scalars only."""

    def __init__(self, names: tuple[str, ...], folder: Path, device: torch.device) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=list(names) or None,
            project_dir=str(folder / "tracking"),
        )
        (folder / "tracking").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self._accelerator.init_trackers("ppo")
        return self

    def __exit__(self, *_: object) -> None:
        # Not by `end_training`, which would end the process group too, and a recipe goes on.
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand one iteration's scalars to every tracker."""
        self._accelerator.log(values, step=step)
