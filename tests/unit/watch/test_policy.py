"""Checks on policy and update: each finds the fault put into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import OPTConfig, OPTForCausalLM

from suasion.config.schema import LoraConfig, ResponseConfig, ScoreConfig
from suasion.core.records import TokenBatch
from suasion.models.adapters import add_lora
from suasion.models.attention import Packed
from suasion.models.roles import Policy
from suasion.rollout.sampler import Sampling
from suasion.watch import policy, roles, update
from suasion.watch.subject import Subject, subject_of
from suasion.watch.suite import run_checks
from tests.unit.watch.conftest import Build, Stage, again

QUIET = Console(quiet=True)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


class Changed(Policy):
    """A policy made of another one; subclasses break it."""

    def __init__(self, whole: Policy) -> None:
        super().__init__(whole.model, whole.temperature)


def rebuilt(subject: Subject, other: Policy) -> Subject:
    """The subject with another policy, in the trainer too."""
    subject.parts.trainer.policy = other
    return again(subject, policy=other)


def dropout_on(module: nn.Module, share: float = 0.3) -> None:
    """Give every dropout layer this probability."""
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = share


class TestRatio:
    """The first ratio is one."""

    def test_dropout_in_the_update(self, build: Build) -> None:
        """The update draws other dropout than the rollout."""
        subject = build("gpt2")
        dropout_on(subject.parts.policy.model)
        subject.parts.policy.model.train()
        assert not update.ratio(subject).ok

    @PRECISIONS
    @FAMILIES
    def test_other_temperature(self, build: Build, family: str, precision: str) -> None:
        """Logits are divided by another temperature than in the rollout."""
        subject = build(family, precision=precision)
        subject.parts.policy.temperature = 0.7
        found = update.ratio(subject)
        assert not found.ok
        assert found.measured["ratio_error"] > 0.1

    def test_makes_no_step(self, build: Build) -> None:
        """Weights, gradients and optimizer are as before."""
        subject = build(rank=4)
        before = {k: v.clone() for k, v in subject.parts.policy.model.state_dict().items()}
        update.dry_update(subject)
        after = subject.parts.policy.model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(p.grad is None for p in subject.parts.policy.model.parameters())
        assert not subject.parts.trainer.optimizer.state


class TestReference:
    """The KL starts at zero."""

    def test_raw_base_under_a_supervised_adapter(self, build: Build) -> None:
        """Adapters off is the base, not the supervised model."""
        subject = build(rank=4)
        with torch.no_grad():
            for name, parameter in subject.parts.policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.05)
        found = policy.reference(subject)
        assert not found.ok
        assert "merge the supervised adapter" in found.fix

    def test_none_does_not_apply(self, build: Build) -> None:
        """Without a reference there is nothing to look at."""
        found = policy.reference(again(build(), reference=None))
        assert found.ok
        assert not found.applies


class TestRoles:
    """The others have their turn, and the policy is as it was."""

    @pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
    def test_healthy(self, build: Build, rank: int) -> None:
        """Nothing moves."""
        found = roles.roles(build(rank=rank))
        assert found.ok
        assert found.measured["largest"] == 0.0

    def test_a_reward_that_leaves_adapters_off(self, build: Build) -> None:
        """The policy would be the base from then on."""
        subject = build(rank=4)
        score = subject.parts.reward

        def careless(queries: list[str], responses: list[str]) -> list[float]:
            subject.parts.policy.model.base_model.disable_adapter_layers()
            return score(queries, responses)

        (found,) = run_checks(
            again(subject, reward=careless),
            ["roles"],
            console=QUIET,
            only_report=True,
        )
        assert not found.ok
        assert "'default' while the base alone is active" in found.what

    def test_a_reward_that_moves_the_policy(self, build: Build) -> None:
        """It works on the very model that is trained."""
        subject = build()
        score = subject.parts.reward

        def careless(queries: list[str], responses: list[str]) -> list[float]:
            with torch.no_grad():
                subject.parts.policy.head.weight.mul_(1.5)
            subject.parts.policy.head.requires_grad_(False)  # noqa: FBT003
            return score(queries, responses)

        found = roles.roles(again(subject, reward=careless))
        assert not found.ok
        assert found.measured["largest"] > found.measured["tolerance"]
        assert found.measured["changed"] == 1


class Blind(Changed):
    """Sees padding as text."""

    def __call__(self, ids: Tensor, mask: Tensor, **cache: Any) -> Any:
        """Run the trunk without the mask."""
        return super().__call__(ids, torch.ones_like(mask), **cache)


class TestPadding:
    """Padding and batching change nothing."""

    @PRECISIONS
    @FAMILIES
    def test_mask_is_not_passed_on(self, build: Build, family: str, precision: str) -> None:
        """Padding on the left is attended to."""
        subject = build(family, precision=precision)
        blind = Blind(subject.parts.policy)
        blind.packs = False  # else nothing is ever padded
        found = policy.padding(rebuilt(subject, blind))
        assert not found.ok
        assert "logprobs_left" in found.what
        assert "logprobs_right" not in found.what  # a causal mask hides padding behind

    def test_positions_count_padding(self, build: Build) -> None:
        """Absolute positions begin at the padding."""
        subject = build("gpt2")
        subject.parts.policy.packs = False
        subject.parts.policy.takes_positions = False
        assert not policy.padding(subject).ok

    @FAMILIES
    def test_packed_sequences_see_each_other(
        self, build: Build, monkeypatch: pytest.MonkeyPatch, family: str
    ) -> None:
        """Attention over the whole row instead of within each sequence."""
        subject = build(family)

        def leaky(_: Packed, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> Tensor:
            whole = scaled_dot_product_attention(query, key, value, is_causal=True)
            return whole.transpose(1, 2)

        monkeypatch.setattr(Packed, "attend", leaky)
        found = policy.padding(subject)
        assert not found.ok
        assert "logprobs_right" in found.what

    def test_values_alone(self, build: Build) -> None:
        """A critic that looks at the whole batch, under a value head that starts at zero."""
        subject = build()
        critic = subject.parts.critic
        own = critic.values

        def values(batch: TokenBatch, hidden: Tensor) -> Tensor:
            found = own(batch, hidden)
            return found - found.mean()

        critic.values = values  # type: ignore[method-assign]
        found = policy.padding(subject)
        assert not found.ok
        assert found.measured["logprobs_right"] < 1e-4


class TestModes:
    """Training mode is evaluation mode."""

    def test_dropout(self, build: Build) -> None:
        """Dropout of the base model."""
        subject = build("gpt2")
        dropout_on(subject.parts.policy.model)
        found = policy.modes(subject)
        assert not found.ok
        assert found.measured["logprobs"] > 0.01

    def test_dropout_before_an_adapter_that_starts_at_zero(self, build: Build) -> None:
        """It shows only once the adapter has learnt."""
        subject = build(rank=4)
        trained = add_lora(
            subject.parts.policy.model.unload(), LoraConfig(r=4, dropout=0.3), dropout=True
        )
        other = Policy(trained, 1.0)
        optimizer = torch.optim.SGD([p for _, p in other.trainable()], lr=0.1)
        subject.parts.trainer.optimizer = optimizer
        assert not policy.modes(rebuilt(subject, other)).ok

    def test_leaves_modes_as_they_were(self, build: Build) -> None:
        """Module by module."""
        subject = build()
        some = next(iter(subject.parts.policy.model.children()))
        some.train()
        policy.modes(subject)
        assert some.training
        assert not subject.parts.policy.model.training


class TestSampler:
    """What is sampled is what is scored."""

    @pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.8}, {"min_tokens": 3}], ids=str)
    def test_filters(self, build: Build, how: dict[str, Any]) -> None:
        """Those that the configuration names."""
        found = policy.sampler(build(response=ResponseConfig(max_tokens=12, **how)))
        assert not found.ok
        assert "another distribution" in found.what

    def test_filter_that_nobody_tells_of(self, build: Build) -> None:
        """Found by the samples alone."""
        subject = build(response=ResponseConfig(max_tokens=30, top_k=2))
        found = policy.sampler(replace(subject, sampling=Sampling()))
        assert not found.ok
        assert "likelier than chance" in found.what

    def test_positions_of_the_cache(self, stage: Stage) -> None:
        """Decoding under left padding, in a family with absolute positions that gets none."""
        parts, config = stage("gpt2")
        parts.policy.packs = False
        parts.policy.takes_positions = False
        found = policy.sampler(subject_of(parts, config, seed=3))
        assert not found.ok
        assert "disagree" in found.what

    def test_other_weights(self, build: Build) -> None:
        """The rollout came from an older copy of the weights."""
        subject = build()
        with torch.no_grad():
            subject.parts.policy.head.weight.mul_(1.1)
        found = policy.sampler(subject)
        assert not found.ok
        assert "disagree" in found.what


class Endless(Changed):
    """Keeps the stop token down."""

    def __init__(self, whole: Policy, stop_id: int, by: float) -> None:
        self.stop_id, self.by = stop_id, by
        super().__init__(whole)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits with the stop token lowered."""
        found = super().logits(hidden)
        found[..., self.stop_id] -= self.by
        return found


def endless(stage: Stage, by: float, **more: Any) -> Subject:
    """A policy whose stop token is `by` nats less likely than drawn."""
    parts, config = stage(**more)
    other = Endless(parts.policy, parts.codec.stop_ids[0], by)
    parts.trainer.policy = other
    return subject_of(replace(parts, policy=other), config, seed=3)


class TestStop:
    """Responses can end."""

    def test_suppressed(self, stage: Stage) -> None:
        """Its probability is zero."""
        found = policy.stop(endless(stage, by=1e9))
        assert not found.ok
        assert found.measured["highest_probability"] == 0.0

    def test_never_reached_and_paid_for(self, stage: Stage) -> None:
        """Too unlikely for the length of the responses."""
        paid = ScoreConfig(no_eos="replace")
        assert policy.stop(endless(stage, by=0.0, score=paid)).ok
        found = policy.stop(endless(stage, by=7.0, score=paid))
        assert not found.ok
        assert "loses its score" in found.what
        # Where responses of one length are what the run wants, the same policy is sound.
        assert policy.stop(endless(stage, by=7.0)).ok

    def test_not_in_the_vocabulary(self, build: Build) -> None:
        """The output head has no row for it."""
        subject = build()
        codec = replace(subject.parts.codec, stop_ids=(0, 99_999))
        found = policy.stop(again(subject, codec=codec))
        assert not found.ok
        assert "99999" in found.what

    @pytest.mark.parametrize(
        "setting",
        [
            {"min_length": 5},
            {"min_new_tokens": 5},
            {"suppress_tokens": [0]},
            {"begin_suppress_tokens": [0]},
            {"bad_words_ids": [[7, 8], [0]]},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
    def test_generation_settings(self, build: Build, rank: int, setting: dict[str, Any]) -> None:
        """What the model folder itself asks for."""
        subject = build("llama", rank)
        assert subject.parts.codec.stop_ids == (0,)
        for name, value in setting.items():
            setattr(subject.parts.policy.model.generation_config, name, value)
        found = policy.stop(subject)
        assert not found.ok
        assert next(iter(setting)) in found.what

    def test_a_run_with_longer_responses_than_the_checks(self, build: Build) -> None:
        """The share that can end grows with the length, as independent chances do."""
        subject = build(score=ScoreConfig(no_eos="replace"))
        subject = replace(subject, rollout=replace(subject.rollout, finished=[False] * 8))
        short = policy.stop(subject).measured["expected_to_end"]
        twice = policy.stop(replace(subject, max_tokens=24)).measured["expected_to_end"]
        assert short < twice < 2 * short


class Switching(Changed):
    """Turns to another adapter as soon as it has answered."""

    def logprobs(self, batch: TokenBatch, **options: Any) -> Any:
        """As the policy's, then switch."""
        found = super().logprobs(batch, **options)
        if torch.is_grad_enabled():
            self.model.set_adapter("other")
        return found


class TestGradients:
    """They reach what learns, and nothing else."""

    @FAMILIES
    def test_adapter_switched_before_backward(self, build: Build, family: str) -> None:
        """The switch freezes the adapter that was used."""
        subject = build(family, rank=4)
        model: Any = subject.parts.policy.model
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("default")
        switching = rebuilt(subject, Switching(subject.parts.policy))
        (found,) = run_checks(switching, ["gradients"], console=QUIET, only_report=True)
        assert not found.ok
        assert "the adapter 'default' while the adapter 'other' is active" in found.what

    def test_frozen_after_the_optimizer_was_built(self, build: Build) -> None:
        """The optimizer waits for gradients that never come."""
        subject = build()
        subject.parts.policy.model.model.layers[0].requires_grad_(False)  # noqa: FBT003
        found = update.gradients(subject)
        assert not found.ok
        assert "model.layers.0" in found.what
        assert found.measured["without_gradient"] == 9

    def test_forgotten_by_the_optimizer(self, build: Build) -> None:
        """What would learn is not stepped."""
        subject = build()
        subject.parts.trainer.optimizer.param_groups.pop()  # the critic's
        found = update.gradients(subject)
        assert not found.ok
        assert found.measured["outside"] == 2

    def test_not_finite(self, build: Build) -> None:
        """One loss is not a number."""
        subject = build()
        subject.parts.trainer.value_loss = lambda values, *_: values * float("nan")
        found = update.gradients(subject)
        assert not found.ok
        assert found.measured["not_finite"] > 0


class Caching(nn.Module):
    """A model with the library's default, a key-value cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Whatever was asked, use the cache."""
        return self.model(**{**inputs, "use_cache": True})


class TestPacking:
    """Documents in one row do not see each other."""

    DOCUMENTS = ([5, 9, 11, 40, 7], [30, 31, 32], [8, 60, 61, 62])

    @FAMILIES
    def test_exact(self, build: Build, family: str) -> None:
        """Without cache and mask, both families are exact."""
        found = policy.packing(replace(build(family), isolated=True))
        assert found.ok
        assert found.measured["leak"] < 1e-4

    def test_a_cache_leaks(self, build: Build) -> None:
        """With a cache the position ids are not read as boundaries."""
        subject = replace(build(), isolated=True)
        subject.parts.policy.model = Caching(subject.parts.policy.model)
        found = policy.packing(subject)
        assert not found.ok
        assert found.measured["leak"] > 0.1

    def test_a_family_without_position_ids_leaks(self) -> None:
        """OPT takes its positions from the mask."""
        torch.manual_seed(1)
        config = OPTConfig(
            vocab_size=70, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2, dropout=0.0,
        )  # fmt: skip
        assert policy.packing_leak(OPTForCausalLM(config), self.DOCUMENTS) > policy.LEAK

    def test_not_claimed_does_not_apply(self, build: Build) -> None:
        """Blocks as the supervised stage packs them claim nothing."""
        assert not policy.packing(build()).applies


def test_tolerance_follows_the_arithmetic(build: Build) -> None:
    """Reduced precision is allowed more."""
    assert build().tolerance().largest == 1e-3
    assert build(precision="bf16").tolerance().largest == 1.0


@FAMILIES
def test_reduced_precision_is_no_fault(build: Build, family: str) -> None:
    """Rounding alone raises nothing."""
    subject = build(family, rank=4, precision="bf16")
    for check in (update.ratio, policy.reference, policy.padding, policy.modes, policy.sampler):
        found = check(subject)
        assert found.ok, found.what


def test_one_token_of_one_prompt_is_enough(stage: Stage) -> None:
    """The smallest rollout there is."""
    parts, config = stage(response=ResponseConfig(max_tokens=1))
    single = subject_of(parts, config, seed=1, prompts=1)
    for check in (update.ratio, policy.reference, policy.padding, policy.sampler, policy.stop):
        assert check(single).ok
