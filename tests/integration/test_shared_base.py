"""Policy, critic, reward and reference on one base compute what four separate models compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from suasion.cli.build_roles import Roles, roles_of
from suasion.cli.build_update import losses_of, settings_of
from suasion.config.schema import (
    QUESTION_ANSWER,
    CriticConfig,
    LoraConfig,
    PpoConfig,
    ResponseConfig,
)
from suasion.core.records import token_batch
from suasion.core.seeding import generator
from suasion.functional.advantages import gae
from suasion.models.adapters import add_lora
from suasion.models.load import (
    load_causal_lm,
    load_codec,
    new_reward_model,
    save_model,
    switch_off_dropout,
    train_tokenizer,
)
from suasion.models.references import FrozenReference
from suasion.models.roles import ModelCritic, Policy
from suasion.models.scope import AdapterScope
from suasion.models.shared import POLICY
from suasion.rollout.experience import Experience, build_experience
from suasion.rollout.rewards import Checked, RewardModel
from suasion.rollout.sampler import sample
from suasion.trainers.policy import PolicyTrainer
from suasion.trainers.ppo import uniform_rows
from tests.unit.conftest import FAMILIES, SHAPES, tiny_model

QUANTISED = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ROUNDS = 20
QUERIES = ["how long?", "not long", "long at all?"]
TEXT = "Question: how long?\n\nAnswer: not long at all, not long."
ALL_FAMILIES = (*FAMILIES, "qwen3")
SHAPES.setdefault("qwen3", {**SHAPES["qwen2"], "head_dim": 8})


def write(folder: Path, family: str) -> PpoConfig:
    """A base, and a reward adapter with its head on it, all with drawn weights."""
    tokenizer = train_tokenizer([TEXT], 290)
    base = folder / "base"
    save_model(base, tiny_model(family), tokenizer, QUESTION_ANSWER)
    codec = load_codec(str(base), QUESTION_ANSWER)
    judge: Any = new_reward_model(str(base), codec.pad_id, torch.float32, seed=1)
    judge = add_lora(judge, LoraConfig(r=2), head=True)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in judge.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    save_model(folder / "reward", judge, tokenizer, QUESTION_ANSWER)
    return PpoConfig(
        model=str(base),
        reward=str(folder / "reward"),
        shared_base=True,
        mini_batch_size=2,
        epochs=1,
        critic=CriticConfig(kind="reward_model", clip=None),
        lora=LoraConfig(r=4),
        response=ResponseConfig(max_tokens=4),
    )


def separate(config: PpoConfig) -> Roles:
    """The same four roles as four models of their own, put together without the code under test."""
    base, adapter, held = str(config.model), str(config.reward), config.lora.base
    codec = load_codec(adapter, QUESTION_ANSWER)

    def scorer(*, learns: bool) -> Any:
        plain = new_reward_model(base, codec.pad_id, torch.float32, seed=9, held=held)
        model = PeftModel.from_pretrained(plain, adapter, is_trainable=learns).eval()
        classifier: Any = model.get_base_model()
        classifier.score = classifier.score.modules_to_save["default"]
        switch_off_dropout(model)
        return model

    model = add_lora(load_causal_lm(base, held=held), config.lora, seed=5, dropout=False)
    switch_off_dropout(model)
    reward = RewardModel(scorer(learns=False), codec)
    return Roles(
        Policy(model, 1.0),
        FrozenReference(load_causal_lm(base, held=held), 1.0),
        ModelCritic(scorer(learns=True)),
        Checked(reward, "separate"),
    )


class Steps(torch.optim.SGD):
    """Plain descent that keeps the gradients it went along."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.02)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Note them, then step."""
        every = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [p.grad.clone() for p in every]
        super().step()


@dataclass
class Run:
    """Roles in use."""

    roles: Roles
    config: PpoConfig
    trainer: PolicyTrainer = field(init=False)
    optimizer: Steps = field(init=False)
    codec: Any = field(init=False)

    def __post_init__(self) -> None:
        """Put a trainer on them; both runs name parameters in one order."""
        self.codec = load_codec(str(self.config.model), QUESTION_ANSWER)
        critic = [p for p in self.roles.critic.module.parameters() if p.requires_grad]
        self.optimizer = Steps(
            [{"params": [p for _, p in self.roles.policy.trainable()]}, {"params": critic}]
        )
        schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        self.trainer = PolicyTrainer(
            self.roles.policy,
            self.roles.critic,
            self.optimizer,
            schedule,
            *losses_of(self.config),
            settings_of(self.config),
            pad_id=self.codec.pad_id,
            autocast=torch.enable_grad,
        )

    def round(self, number: int) -> tuple[list[str], Experience]:
        """Roll out, score, estimate, optimise."""
        r = self.roles
        r.policy.model.eval()
        limits = [4, 3, 4]
        rollout = sample(
            r.policy,
            [self.codec.prompt_ids(query) for query in QUERIES],
            limits,
            uniform_rows(3, ("round", number), limits),
            stop_ids=self.codec.stop_ids,
            pad_id=self.codec.pad_id,
        )
        texts = [self.codec.text_of(ids) for ids in rollout.responses]
        experience = build_experience(
            rollout,
            torch.tensor(r.reward(QUERIES, texts)),
            policy=r.policy,
            reference=r.reference,
            critic=r.critic,
            estimate=partial(gae, gamma=1.0, lam=0.95),
            kl_coef=0.1,
            whiten_advantages=True,
            pad_id=self.codec.pad_id,
            batch_tokens=64,
        )
        self.trainer.optimise(experience, generator(3, "mini-batches", number))
        return texts, experience


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference, relative where the numbers are large."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(one, other, strict=True)]
    return max(float(((a - b).abs() / b.abs().clamp(min=1.0)).max()) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # GPT-2's layers, quantised
@pytest.mark.parametrize(
    ("family", "held"),
    [
        *((family, "fp32") for family in ALL_FAMILIES),
        *(pytest.param(f, h, marks=QUANTISED) for f in ("llama", "gpt2") for h in ("int8", "nf4")),
    ],
)
def test_one_base_is_four_models(family: str, held: Any, tmp_path: Path) -> None:
    """Scores, values, log-probabilities and gradients, through twenty rounds.

    A quantised base computes one function in training and evaluation alike, so there too the roles
    equal four separate models with bases of their own quantised alike.
    """
    config = write(tmp_path, family)
    config = replace(config, lora=replace(config.lora, base=held))
    codec = load_codec(str(config.model), QUESTION_ANSWER)
    theirs = Run(separate(config), config)
    ours = Run(roles_of(config, codec, torch.device("cpu"), seed=1), config)
    with torch.no_grad():  # the seeds of the two policies' adapters differ
        for (_, a), (_, b) in zip(
            ours.roles.policy.trainable(), theirs.roles.policy.trainable(), strict=True
        ):
            a.copy_(b)
    base = {n: p.clone() for n, p in scope_of(ours).base_weights()}
    begun = [p.clone() for p in ours.optimizer.param_groups[0]["params"]]
    for number in range(ROUNDS):
        (texts, own), (expected, other) = ours.round(number), theirs.round(number)
        assert texts == expected
        names = ("scores", "values", "logprobs", "ref_logprobs", "advantages")
        off = {n: largest([getattr(own, n)], [getattr(other, n)]) for n in names}
        off["gradients"] = largest(ours.optimizer.gradients, theirs.optimizer.gradients)
        assert max(off.values()) <= 1e-6, (number, off)
        assert scope_of(ours).active == POLICY
    # The rounds did something, and the base took no part in it.
    assert largest(ours.optimizer.param_groups[0]["params"], begun) > 1e-3
    assert largest([own.ref_logprobs], [own.logprobs]) > 1e-3
    assert all(torch.equal(base[n], p) for n, p in scope_of(ours).base_weights())


@QUANTISED
@pytest.mark.parametrize(("held", "most"), [("int8", 0.1), ("nf4", 1.0)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_rounding_moves_roles_no_further_than_this(
    family: str, held: Any, most: float, tmp_path: Path
) -> None:
    """Against the same roles on a base in fp32, before any step (figures in docs/memory.md)."""
    config = write(tmp_path, family)
    codec = load_codec(str(config.model), QUESTION_ANSWER)
    found = {}
    for kind in ("fp32", held):
        rounded = replace(config, lora=replace(config.lora, base=kind))
        r = roles_of(rounded, codec, torch.device("cpu"), seed=1)
        batch = token_batch([[5, 9, 12], [7, 40, 41]], [[20, 21], [22, 23, 24, 25]], codec.pad_id)
        with torch.no_grad():
            found[kind] = (
                r.policy.logprobs(batch)[0],
                r.critic.values(batch, torch.empty(0)),
                torch.tensor(r.reward(QUERIES, ["not long", "long", "at all"])),
            )
    off = {
        name: float((a - b).abs().max())
        for name, a, b in zip(("logprobs", "values", "scores"), *found.values(), strict=True)
    }
    assert 0 < max(off.values()) <= most, off


def scope_of(run: Run) -> AdapterScope:
    """Of the shared roles."""
    assert run.roles.policy.scope is not None
    return run.roles.policy.scope
