"""Configuration becomes objects here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from suasion.config.recipe import STAGES
from suasion.config.schema import PpoConfig, Recipe
from suasion.core.errors import ConfigError, ModelError
from suasion.core.seeding import seed_of
from suasion.data.codec import Codec
from suasion.data.sources import Source, fitting, spread
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.models.adapters import add_lora
from suasion.models.load import (
    context_of,
    device_for_training,
    dtype_for,
    load_causal_lm,
    load_codec,
    load_reward_model,
    new_reward_model,
    save_model,
    score_head,
    switch_off_dropout,
)
from suasion.models.roles import (
    AdapterOffReference,
    Critic,
    FrozenReference,
    ModelCritic,
    Policy,
    Reference,
    TrunkCritic,
    hidden_size_of,
)
from suasion.rollout.rewards import load_function, load_reward
from suasion.trainers.policy import PolicyTrainer, UpdateSettings
from suasion.trainers.ppo import PpoLoop, PpoParts
from suasion.trainers.sft import save_trained
from suasion.watch.finding import Finding
from suasion.watch.signals import warnings_about
from suasion.watch.subject import subject_of
from suasion.watch.suite import QUICK, run_checks


def ppo(config: PpoConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Build the policy stage, check it, run it, and save policy and critic.

    Raises:
        CheckError: a check found a fault, and `checks` is "stop".
    """
    parts = ppo_parts(config, seed=seed)
    if config.checks != "off":
        subject = subject_of(parts, config, seed=seed)
        told = config.checks == "report"
        run_checks(subject, QUICK, console=console, only_report=told, brief=True)
    with _Trackers(config.track, folder, parts.policy.device) as trackers:
        loop = PpoLoop(
            parts,
            config,
            folder=folder,
            seed=seed,
            console=console,
            log=trackers.log,
            observe=warnings_about,
        )
        result = loop.run()
    save_trained(
        folder,
        parts.policy.model,
        parts.codec.tokenizer,
        config.template,
        merge=config.lora.merge,
    )
    _save_critic(folder / "critic", parts.critic, parts.codec, config.template)
    return {**result, "prompts": len(parts.queries), "critic": config.critic.kind}


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


def ppo_parts(config: PpoConfig, *, seed: int) -> PpoParts:
    """The objects of a policy stage.

    Raises:
        ConfigError: two settings do not go together.
        ModelError: a model folder cannot be used.
    """
    assert config.model is not None
    device = device_for_training()
    codec = load_codec(config.model, config.template)
    policy = _policy(config, device, seed)
    reference: Reference = (
        AdapterOffReference(policy) if config.lora.r else FrozenReference.copy_of(policy)
    )
    critic = _critic(config, policy, codec, device)
    critic.module.to(device)
    optimizer = _optimizer(config, policy, critic)
    trainer = PolicyTrainer(
        policy,
        critic,
        optimizer,
        _schedule(config, optimizer),
        partial(clipped_surrogate, clip_low=config.clip, clip_high=config.clip),
        partial(clipped_value_loss, clip=config.critic.clip),
        _settings(config),
        pad_id=codec.pad_id,
        autocast=autocast_for(config.precision, device),
    )
    queries, fixed = _prompts(config, policy, codec)
    judge = load_reward(str(config.reward), config.template)
    return PpoParts(policy, reference, critic, trainer, judge, codec, queries, fixed)


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Context of each forward pass: fp32 weights, arithmetic as asked."""
    dtype = dtype_for(precision, device)
    if dtype is torch.float32:
        return nullcontext
    return partial(torch.autocast, device.type, dtype=dtype)


def _policy(config: PpoConfig, device: torch.device, seed: int) -> Policy:
    model: Any = load_causal_lm(str(config.model))
    if config.lora.r:
        model = add_lora(model, config.lora, seed=seed_of(seed, "adapter"), dropout=False)
    switch_off_dropout(model)
    model.to(device)
    return Policy(model, config.response.temperature)


def _critic(config: PpoConfig, policy: Policy, codec: Codec, device: torch.device) -> Critic:
    if config.critic.kind == "value_head":
        return TrunkCritic(hidden_size_of(policy))
    if config.critic.kind == "policy_copy":
        model: Any = new_reward_model(str(config.model), codec.pad_id, torch.float32, seed=0)
        torch.nn.init.zeros_(score_head(model).weight)
    else:
        source = str(config.reward)
        if not Path(source).is_dir():
            raise ConfigError(
                f"ppo.critic.kind is reward_model, but ppo.reward is {source}, not a model folder",
                "use critic.kind value_head or policy_copy",
            )
        judge = load_codec(source, config.template)
        if judge.tokenizer.get_vocab() != codec.tokenizer.get_vocab():
            raise ModelError(
                f"the critic would come from {source}, whose tokenizer is not the policy's",
                "use critic.kind value_head or policy_copy",
            )
        model = load_reward_model(source)
    switch_off_dropout(model)
    return ModelCritic(model.to(device))


def _optimizer(config: PpoConfig, policy: Policy, critic: Critic) -> torch.optim.Optimizer:
    kind = load_function(config.optimizer)
    rate = config.learning_rate
    groups = [
        {"params": [p for _, p in policy.trainable()], "lr": rate},
        {"params": list(critic.module.parameters()), "lr": config.critic.learning_rate or rate},
    ]
    try:
        optimizer = kind(groups, lr=rate)
    except TypeError as error:
        raise ConfigError(f"ppo.optimizer {config.optimizer}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"ppo.optimizer {config.optimizer} is not a torch optimizer")
    return optimizer


def _schedule(config: PpoConfig, optimizer: torch.optim.Optimizer) -> Any:
    def share(step: int) -> float:
        return 1.0 if config.schedule == "constant" else max(1.0 - step / config.steps, 0.0)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _settings(config: PpoConfig) -> UpdateSettings:
    return UpdateSettings(
        epochs=config.epochs,
        mini_batch_size=config.mini_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        max_grad_norm=config.max_grad_norm,
        value_coef=config.critic.coef,
        entropy_coef=config.entropy,
        clip=config.clip,
        value_clip=config.critic.clip,
        whiten_mini_batches=config.whiten == "mini_batch",
        kl_stop=config.kl.stop,
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


def _save_critic(folder: Path, critic: Critic, codec: Codec, template: str) -> None:
    if critic.on_trunk:
        from safetensors.torch import save_file

        from suasion.core.files import atomic_folder

        with atomic_folder(folder) as partial_folder:
            tensors = {k: v.cpu() for k, v in critic.module.state_dict().items()}
            save_file(tensors, partial_folder / "value_head.safetensors")
        return
    save_model(folder, critic.module, codec.tokenizer, template)


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
        self._accelerator.end_training()

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand one iteration's scalars to every tracker."""
        self._accelerator.log(values, step=step)
