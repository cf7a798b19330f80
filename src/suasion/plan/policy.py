"""The policy stage: four roles, and what each phase of an iteration holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from suasion.config.schema import LoraConfig, PpoConfig
from suasion.core.errors import ConfigError
from suasion.core.records import Rollout
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.models.load import context_of, switch_off_dropout
from suasion.models.references import (
    AdapterReference,
    FrozenReference,
    Reference,
    front_parameters,
)
from suasion.models.roles import (
    AdapterCritic,
    AdapterStates,
    Critic,
    ModelCritic,
    Policy,
    TrunkCritic,
    hidden_size_of,
)
from suasion.models.scope import AdapterScope
from suasion.models.shared import CRITIC, POLICY, REFERENCE, REWARD
from suasion.plan.cards import Card
from suasion.plan.hollow import furnish
from suasion.plan.records import StagePlan, Work
from suasion.plan.rehearse import Optimizer, Rehearsal, Workshop, merge_parts
from suasion.plan.scoring import SCORED_TOKENS, Judge, answer_phases, folded, judge_of
from suasion.plan.states import Stored, measured_states
from suasion.rollout.experience import Experience, build_experience
from suasion.rollout.rewards import load_function
from suasion.trainers.policy import PolicyTrainer, UpdateSettings


@dataclass(frozen=True)
class Cast:
    """Where the roles of a policy stage come from."""

    policy: PretrainedConfig
    """Architecture of the policy."""
    reward: PretrainedConfig | None
    """Architecture of the reward model; None where the reward is a function."""
    reference: PretrainedConfig | None = None
    """Architecture of a reference of its own kind."""
    continued: bool = False
    """Whether the policy goes on with an adapter, of which the reference is a snapshot."""
    reward_lora: LoraConfig | None = None
    """The reward model's adapter, where it shares the policy's base."""


class PolicyStage:
    """Builds the roles as `suasion.cli.build` does, of hollow models.

    Args:
        shop: Makes the models.
        config: Of the stage; sizes may change from run to run, the rest may not.
        cast: Who plays whom.
        card: Where it would run.
    """

    name = "ppo"

    def __init__(self, shop: Workshop, config: PpoConfig, cast: Cast, card: Card) -> None:
        self.card = card
        self.cast = cast
        self.context = context_of(cast.policy)
        self.stage = Rehearsal(shop.world, cast.policy.vocab_size, card.process)
        self.autocast = partial(card.autocast, config.precision)
        lora = config.lora if config.lora.r else None
        shares = config.shared_base and lora is not None and cast.reward_lora is not None
        model = shop.model(
            "policy",
            cast.policy,
            held=config.lora.base,
            rest=card.rest_dtype(config.precision),
            lora=lora,
            dropout=False,
            more=_more_adapters(config, cast) if lora else (),
            # A scope leaves hooks on it, and shared layers are frozen.
            again=lora is not None or config.reference.layers is not None,
        )
        switch_off_dropout(model)
        self.stage.add("policy", model)
        scope = AdapterScope(model, POLICY) if lora else None
        with self.stage.trying(model):
            self.policy = Policy(model, config.response.temperature, scope)
        self.reference = self._reference(shop, config)
        self.critic = self._critic(shop, config, shares=shares)
        self.judge = self._judge(shop, config, shares=shares)
        groups = {"policy": ([p for _, p in self.policy.trainable()], config.learning_rate)}
        rate = config.critic.learning_rate or config.learning_rate
        groups["critic"] = (list(self.critic.module.parameters()), rate)
        self.stage.train(optimizer_of(config, card), groups)
        self.merges = config.lora.r > 0 and config.lora.merge

    def _reference(self, shop: Workshop, config: PpoConfig) -> Reference | None:
        r, scope = config.reference, self.policy.scope
        if r.kind == "none":
            return None
        if r.kind != "model" and scope is not None:
            name = REFERENCE if self.cast.continued else None
            if name:
                scope.add(name, learns=False)
            return AdapterReference(self.policy, scope, name)
        if r.layers is not None:
            with shop.world:
                shared = front_parameters(self.policy.model, r.layers)
                if shared is None:
                    raise ConfigError(
                        f"ppo.reference.layers is {r.layers}, and the policy has no layer after it",
                        "share fewer layers than the model has",
                    )
            with self.stage.inside():
                made = FrozenReference.copy_of(self.policy, shared=shared)
            self.stage.add("reference", made.model, f"its first {r.layers} layers are the policy's")
            return made
        model = shop.model(
            "reference",
            self.cast.reference or self.cast.policy,
            held=r.base,
            rest=self.card.rest_dtype(config.precision),
        )
        self.stage.add("reference", model, "waits in the processor's memory" * r.offload)
        with self.stage.trying(model):
            return FrozenReference(model, self.policy.temperature)

    def _critic(self, shop: Workshop, config: PpoConfig, *, shares: bool) -> Critic:
        width = hidden_size_of(self.policy)
        if config.critic.kind == "value_head":
            critic: Critic = TrunkCritic(width)
            with shop.world:
                furnish(critic.module)
            self.stage.add("critic", critic.module, "a head on the policy's trunk")
            return critic
        if shares or (config.shared_base and config.critic.kind == "policy_copy"):
            critic = AdapterCritic(self._states(shop, CRITIC, learns=True))
            self.stage.add("critic", critic.module, "an adapter on the policy's base")
            return critic
        source = self.cast.policy if config.critic.kind == "policy_copy" else self.cast.reward
        if source is None:
            raise ConfigError(
                f"ppo.critic.kind is reward_model, but ppo.reward is {config.reward}, not a model",
                "use critic.kind value_head or policy_copy",
            )
        model = shop.model("critic", source, scores=True, dropout=False)
        switch_off_dropout(model)
        self.stage.add("critic", model)
        with self.stage.trying(model):
            return ModelCritic(model)

    def _judge(self, shop: Workshop, config: PpoConfig, *, shares: bool) -> Judge | None:
        if self.cast.reward is None:
            return None
        if shares:
            states = self._states(shop, REWARD, learns=False)
            self.stage.add("reward", states.head, "an adapter on the policy's base")
            return judge_of(self.stage, self.policy.model, states)
        model = shop.model("reward", self.cast.reward, scores=True)
        self.stage.add("reward", model)
        return judge_of(self.stage, model)

    def _states(self, shop: Workshop, name: str, *, learns: bool) -> AdapterStates:
        scope = self.policy.scope
        assert scope is not None
        scope.add(name, learns=learns)
        head = nn.Linear(hidden_size_of(self.policy), 1)
        with shop.world:
            furnish(head).requires_grad_(learns)
        with self.stage.trying(self.policy.model):
            return AdapterStates(self.policy.model, head, scope, name)

    def run(self, config: PpoConfig) -> StagePlan:
        """Go through an iteration once, with the sizes of `config`."""
        longest = config.response.max_tokens
        prompt = min(config.prompt_tokens or self.context, self.context - longest)
        if prompt < 1:
            raise ConfigError(
                f"ppo.response.max_tokens {longest} leaves no room for a prompt in a context of "
                f"{self.context} tokens",
                "shorten the responses",
            )
        whole = prompt + longest
        per_pass = max(1, config.micro_batch_tokens // whole)
        away = ("reference",) if config.reference.offload and self.card.gpu else ()
        here = tuple(role.name for role in self.stage.roles if role.name not in away)
        # Two micro-batches show everything: the second one finds the gradients of the first.
        rows = min(config.mini_batch_size, 2 * per_pass)
        few, p, r = folded(self.policy, rows, prompt, longest)
        trainer = self._trainer(config, few)
        experience = _experience(few, p, r)
        self.policy.model.train()
        self.stage.phase(
            "update", lambda: trainer.optimise(experience, torch.Generator().manual_seed(0)), here
        )
        count = min(config.batch_size, config.response.at_once)
        answer_phases(
            self.stage,
            self.policy,
            count,
            prompt,
            config.response,
            autocast=self.autocast,
            roles=here,
        )
        if self.judge is not None:
            together = min(config.batch_size, -(-SCORED_TOKENS // whole))
            score = partial(self.judge.score, together, prompt, longest)
            self.stage.phase("rewards", score, here)
        few, p, r = folded(self.policy, min(config.batch_size, per_pass), prompt, longest)
        rollout = _rollout(few, p, r, self.critic)
        self.stage.phase("scoring", partial(self._score, config, rollout))
        if self.merges:
            merge_parts(self.stage, self.policy.model, config.lora, on_host=self.card.gpu)
        said = () if config.prompt_tokens else (f"ppo: prompts of up to {prompt} tokens",)
        work = self._work(config, prompt)
        return StagePlan("ppo", self.stage.roles, self.stage.taken(), work, said)

    def _score(self, config: PpoConfig, rollout: Rollout) -> None:
        with self.autocast():
            build_experience(
                rollout,
                torch.zeros(len(rollout)),
                policy=self.policy,
                reference=self.reference,
                critic=self.critic,
                estimate=partial(gae, gamma=config.gamma, lam=config.lam),
                kl_coef=config.kl.coef,
                whiten_advantages=False,
                pad_id=0,
                batch_tokens=config.micro_batch_tokens,
            )

    def _trainer(self, config: PpoConfig, rows: int) -> PolicyTrainer:
        optimizer = self.stage.optimizer
        return PolicyTrainer(
            self.policy,
            self.critic,
            optimizer,
            SimpleNamespace(step=lambda: None),  # the learning rate takes no memory
            partial(clipped_surrogate, clip_low=config.clip, clip_high=config.clip),
            partial(clipped_value_loss, clip=config.critic.clip),
            UpdateSettings(
                epochs=1,
                mini_batch_size=rows,
                micro_batch_tokens=config.micro_batch_tokens,
                max_grad_norm=config.max_grad_norm,
                value_coef=config.critic.coef,
                entropy_coef=config.entropy,
            ),
            pad_id=0,
            autocast=self.autocast,
        )

    def _work(self, config: PpoConfig, prompt: int) -> Work:
        roles = {role.name: role for role in self.stage.roles}
        policy, critic = roles["policy"], roles["critic"]
        tokens = config.batch_size * (prompt + config.response.max_tokens)
        passes = 2.0 * policy.parameters  # the rollout
        if self.reference is not None:
            passes += 2.0 * policy.parameters
        if "reward" in roles:
            passes += 2.0 * max(roles["reward"].parameters, policy.parameters)
        learns = policy.trainable + critic.trainable
        updates = config.epochs * (4.0 * (policy.parameters + critic.parameters) + 2.0 * learns)
        weights = sum(policy.weights.values()) + policy.adapters
        rounds = -(-config.batch_size // config.response.at_once)
        streamed = float(weights) * config.response.max_tokens * rounds
        return Work(tokens * (passes + updates), tokens, config.steps, streamed)


def _more_adapters(config: PpoConfig, cast: Cast) -> tuple[tuple[str, int], ...]:
    """Adapters beside the policy's on its base, with their ranks."""
    snapshot = cast.continued and config.reference.kind == "start"
    found = [(REFERENCE, config.lora.r)] if snapshot else []
    if config.shared_base:
        if cast.reward_lora is not None:
            found.append((REWARD, cast.reward_lora.r))
        if config.critic.kind == "policy_copy":
            found.append((CRITIC, config.lora.r))
        elif config.critic.kind == "reward_model" and cast.reward_lora is not None:
            found.append((CRITIC, cast.reward_lora.r))
    return tuple(found)


def optimizer_of(config: PpoConfig, card: Card) -> Optimizer:
    """The optimizer of a policy stage, as it would be on the card."""
    kind: Callable[..., Any] = load_function(config.optimizer)
    options = dict(config.optimizer_options)
    if not getattr(kind, "__module__", "").startswith("torch."):
        return partial(Stored, size=measured_states(kind, options))
    if card.gpu and "foreach" in inspect.signature(kind).parameters:
        options.setdefault("foreach", True)  # the default there; it holds a copy of all at a time
    return partial(kind, lr=config.learning_rate, **options)


def _experience(rows: int, prompt: int, longest: int) -> Experience:
    flat = torch.zeros(rows, longest)
    return Experience(
        queries=[[0] * prompt] * rows,
        responses=[[0] * longest] * rows,
        mask=torch.ones(rows, longest, dtype=torch.bool),
        logprobs=flat,
        ref_logprobs=flat,
        values=flat,
        scores=torch.zeros(rows),
        rewards=flat,
        advantages=flat,
        returns=flat,
        kl_coef=0.0,
    )


def _rollout(rows: int, prompt: int, longest: int, critic: Critic) -> Rollout:
    each = [torch.zeros(longest)] * rows
    return Rollout(
        queries=[[0] * prompt] * rows,
        responses=[[0] * longest] * rows,
        finished=[False] * rows,
        logprobs=each,
        values=each if critic.on_trunk else None,
    )
