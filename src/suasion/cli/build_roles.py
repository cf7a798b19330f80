"""Who is who in the policy stage: policy, reference, critic, reward. Part of `cli.build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from suasion.config.schema import PpoConfig, ReferenceConfig
from suasion.core.errors import ConfigError, ModelError
from suasion.core.files import atomic_folder
from suasion.core.seeding import seed_of
from suasion.data.codec import Codec
from suasion.models.adapters import add_lora
from suasion.models.checkpointing import checkpoint_layers
from suasion.models.load import (
    load_causal_lm,
    load_codec,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    rest_dtype,
    save_model,
    score_head,
    switch_off_dropout,
)
from suasion.models.quantised import check_held
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
from suasion.models.shared import (
    CRITIC,
    POLICY,
    REFERENCE,
    REWARD,
    StoredAdapter,
    copy_adapter,
    go_on_with,
    is_adapter,
    leave_alone,
    put_adapter,
    read_adapter,
    require_base,
    save_with_head,
)
from suasion.rollout.rewards import Checked, RewardModel, load_reward
from suasion.trainers.sft import save_trained


@dataclass(frozen=True)
class Roles:
    """The four of them."""

    policy: Policy
    """Learns."""
    reference: Reference | None
    """What it is held to."""
    critic: Critic
    """Learns beside it."""
    reward: Checked
    """Scores texts."""


def roles_of(config: PpoConfig, codec: Codec, device: torch.device, *, seed: int) -> Roles:
    """Build the roles that a configuration asks for.

    Raises:
        ConfigError: two settings do not go together.
        ModelError: a folder cannot be used, or does not fit the others.
    """
    _check_settings(config)
    policy = _policy(config, device, seed)
    reference = _reference(config, policy, codec, device)
    if not config.shared_base:
        critic = _critic(config, policy, codec, device)
        return Roles(policy, reference, critic, load_reward(str(config.reward), config.template))
    source = str(config.reward)
    if not Path(source).is_dir():  # a function, or a pipeline: it needs no base
        judge = load_reward(source, config.template)
        return Roles(policy, reference, _adapter_critic(config, policy, None), judge)
    stored = read_adapter(source)
    require_base(stored, _base_of(config), config.lora.base)
    own = load_codec(source, config.template)
    _require_vocabulary(source, own, codec, "the reward model would read its base with")
    put_adapter(policy.model, REWARD, stored)
    states = _states(policy, REWARD, stored.new_head(), learns=False)
    model = RewardModel(policy.model, own, states=states)
    return Roles(policy, reference, _adapter_critic(config, policy, stored), Checked(model, source))


def save_roles(folder: Path, roles: Roles, codec: Codec, config: PpoConfig) -> None:
    """Write the critic, then `model/` and `adapter/` of the policy, as plain folders.

    Roles on the policy's base are taken off it.
    """
    _save_critic(folder / "critic", roles.critic, codec, config.template)
    model: Any = roles.policy.model
    if roles.policy.scope is not None:
        leave_alone(model, POLICY)
    save_trained(folder, model, codec.tokenizer, config.template, config.lora)


def _check_settings(config: PpoConfig) -> None:
    """Refuse settings that would have no effect, or no meaning."""
    r, adapters = config.reference, config.lora.r > 0
    check_held(config.lora.base, adapters=adapters, where="ppo")
    if config.shared_base and not adapters:
        raise ConfigError(
            "ppo.shared_base is true, but ppo.lora.r is 0: all weights would train, and there "
            "would be no base to share",
            "set ppo.lora.r to 8 or 16, or leave shared_base off",
        )
    if r.kind == "layers" and adapters:
        raise ConfigError(
            "ppo.reference.kind is layers, but with adapters (ppo.lora.r above 0) the reference "
            "shares all layers with the policy already",
            "leave ppo.reference.kind at start",
        )
    for name, needed in (("layers", "layers"), ("model", "model")):
        if (getattr(r, name) is None) == (r.kind == needed):
            raise ConfigError(
                f"ppo.reference.kind is {r.kind}, and ppo.reference.{name} is {getattr(r, name)}",
                f"ppo.reference.{name} goes with kind {needed}, and that with it",
            )
    copied = r.kind == "model" or (r.kind == "start" and not adapters)
    for name, set_so in (("offload", r.offload), ("base", r.base != "fp32")):
        if set_so and not copied:
            raise ConfigError(
                f"ppo.reference.{name} is {getattr(r, name)}, but this reference is no copy: it "
                "has the policy's own weights in memory",
                f"leave ppo.reference.{name} out",
            )


def _policy(config: PpoConfig, device: torch.device, seed: int) -> Policy:
    source, held = str(config.model), config.lora.base
    dtype = rest_dtype(held, config.precision)
    if not config.lora.r:
        model: Any = load_causal_lm(source, dtype, held=held)
    elif is_adapter(source):
        model = go_on_with(*_continued(config, dtype))
    else:
        model = load_causal_lm(source, dtype, held=held)
        model = add_lora(model, config.lora, seed=seed_of(seed, "adapter"), dropout=False)
    if config.lora.r and config.lora.checkpointing:
        checkpoint_layers(model)
    switch_off_dropout(model)
    model.to(device)
    scope = AdapterScope(model, POLICY) if config.lora.r else None
    return Policy(model, config.response.temperature, scope)


def _continued(config: PpoConfig, dtype: torch.dtype) -> tuple[Any, StoredAdapter]:
    """The base of an adapter that the policy goes on with, and the adapter."""
    stored = read_adapter(str(config.model))
    if stored.config.r != config.lora.r:
        raise ConfigError(
            f"ppo.lora.r is {config.lora.r}, the adapter {stored.folder} has rank "
            f"{stored.config.r}, and training goes on with it as it is",
            f"set ppo.lora.r to {stored.config.r}, or merge the adapter and start a new one on it",
        )
    require_base(stored, stored.base, config.lora.base)
    return load_causal_lm(stored.base, dtype, held=config.lora.base), stored


def _base_of(config: PpoConfig) -> str:
    """Folder or Hub name of what the policy's adapter lies on."""
    source = str(config.model)
    return read_adapter(source).base if is_adapter(source) else source


def _reference(
    config: PpoConfig, policy: Policy, codec: Codec, device: torch.device
) -> Reference | None:
    r, scope = config.reference, policy.scope
    if r.kind == "none":
        return None
    if r.kind == "model":
        return _other_model(config, policy, codec, device)
    if scope is not None:
        if not is_adapter(str(config.model)):
            return AdapterReference(policy, scope)
        copy_adapter(policy.model, POLICY, REFERENCE)
        scope.add(REFERENCE, learns=False)
        return AdapterReference(policy, scope, REFERENCE)
    if r.layers is not None:
        front = front_parameters(policy.model, r.layers)
        if front is None:
            raise ConfigError(
                f"ppo.reference.layers is {r.layers}, and the policy has no layer after these, or "
                "names its layers in no known way",
                "share fewer layers than the model has, or take kind start",
            )
        return FrozenReference.copy_of(policy, shared=front)
    if not r.offload and r.base == "fp32":
        return FrozenReference.copy_of(policy)
    return _frozen(str(config.model), r, policy, config, device)


def _other_model(
    config: PpoConfig, policy: Policy, codec: Codec, device: torch.device
) -> Reference:
    r = config.reference
    source = str(r.model)
    tokenizer = load_tokenizer(source)
    if tokenizer.get_vocab() != codec.tokenizer.get_vocab():
        raise ModelError(
            f"ppo.reference.model {source} has another tokenizer than the policy: their "
            "log-probabilities are of different tokens",
            "take a model of the same family, or reference.kind start",
        )
    return _frozen(source, r, policy, config, device)


def _frozen(
    source: str, r: ReferenceConfig, policy: Policy, config: PpoConfig, device: torch.device
) -> FrozenReference:
    """A model from its folder, in the processor's memory where it is to wait there."""
    model: Any = load_causal_lm(source, rest_dtype(r.base, config.precision), held=r.base)
    switch_off_dropout(model)
    model.to("cpu" if r.offload else device)
    return FrozenReference(model, policy.temperature, device=device if r.offload else None)


def _critic(config: PpoConfig, policy: Policy, codec: Codec, device: torch.device) -> Critic:
    if config.critic.kind == "value_head":
        return _on_trunk(policy)
    if config.critic.kind == "policy_copy":
        model: Any = new_reward_model(str(config.model), codec.pad_id, torch.float32, seed=0)
        nn.init.zeros_(score_head(model).weight)
    else:
        source = str(config.reward)
        if not Path(source).is_dir():
            raise _no_reward_model(source)
        own = load_codec(source, config.template)
        _require_vocabulary(source, own, codec, "the critic would come from it and read")
        model = load_reward_model(source)
    switch_off_dropout(model)
    return ModelCritic(model.to(device))


def _adapter_critic(config: PpoConfig, policy: Policy, reward: StoredAdapter | None) -> Critic:
    """A critic on the policy's base: on its trunk, or an adapter of its own."""
    if config.critic.kind == "value_head":
        return _on_trunk(policy)
    if config.critic.kind == "policy_copy":
        copy_adapter(policy.model, POLICY, CRITIC)
        head = nn.Linear(hidden_size_of(policy), 1, bias=False)  # a classifier's has none
        nn.init.zeros_(head.weight)
    elif reward is None:
        raise _no_reward_model(str(config.reward))
    else:
        put_adapter(policy.model, CRITIC, reward)
        head = reward.new_head()
    return AdapterCritic(_states(policy, CRITIC, head, learns=True))


def _on_trunk(policy: Policy) -> Critic:
    critic = TrunkCritic(hidden_size_of(policy))
    critic.module.to(policy.device)
    return critic


def _states(policy: Policy, name: str, head: nn.Linear, *, learns: bool) -> AdapterStates:
    """The policy's base through one of its other adapters, with a head."""
    assert policy.scope is not None
    policy.scope.add(name, learns=learns)
    policy.model.to(policy.device)
    head.to(policy.device).requires_grad_(learns)
    return AdapterStates(policy.model, head, policy.scope, name)


def _require_vocabulary(source: str, own: Codec, codec: Codec, why: str) -> None:
    if own.tokenizer.get_vocab() != codec.tokenizer.get_vocab():
        raise ModelError(
            f"{source} has a tokenizer that is not the policy's, and {why} the policy's tokens",
            "use critic.kind value_head or policy_copy, and leave ppo.shared_base off",
        )


def _no_reward_model(source: str) -> ConfigError:
    return ConfigError(
        f"ppo.critic.kind is reward_model, but ppo.reward is {source}, not a model folder",
        "use critic.kind value_head or policy_copy",
    )


def _save_critic(folder: Path, critic: Critic, codec: Codec, template: str) -> None:
    if isinstance(critic, AdapterCritic):
        states = critic.states
        save_with_head(folder, states.model, states.adapter, states.head, codec.tokenizer, template)
    elif critic.on_trunk:
        with atomic_folder(folder) as partial:
            tensors = {k: v.cpu() for k, v in critic.module.state_dict().items()}
            save_file(tensors, partial / "value_head.safetensors")
    else:
        save_model(folder, critic.module, codec.tokenizer, template)
