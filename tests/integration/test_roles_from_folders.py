"""Roles as a recipe makes them: from folders the stages before wrote, refused where they clash."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from suasion.cli.build import hold_as_computed, ppo, ppo_parts
from suasion.cli.stages import run_stage
from suasion.config.recipe import resolve
from suasion.config.schema import (
    QUESTION_ANSWER,
    CriticConfig,
    LoraConfig,
    PpoConfig,
    Recipe,
    ReferenceConfig,
    ResponseConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.errors import ConfigError, ModelError, SuasionError
from suasion.core.files import keep_json_lines, read_json_lines
from suasion.core.records import token_batch
from suasion.models.load import (
    fresh_causal_lm,
    load_causal_lm,
    load_codec,
    load_reward_model,
    save_model,
    train_tokenizer,
)
from suasion.models.references import AdapterReference, FrozenReference
from suasion.models.roles import AdapterCritic
from suasion.models.shared import POLICY, REFERENCE, REWARD
from suasion.rollout.rewards import RewardModel
from suasion.trainers.ppo import PpoLoop, PpoParts, roll_out
from suasion.watch.subject import subject_of
from suasion.watch.suite import CHECKS, QUICK, run_checks

QUIET = Console(quiet=True)
QUERIES = [f"How many are {n} and {n + 1}?" for n in range(24)]
PAIRS = [
    {"query": query, "response": f"They are {2 * n + 1}.", "chosen": f"They are {2 * n + 1}.",
     "rejected": "Many."}
    for n, query in enumerate(QUERIES)
]  # fmt: skip
STEPS: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "track": ()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `start`, `sft` (an adapter merged), `raw` (not merged), `reward`, `other`."""
    folder = tmp_path_factory.mktemp("made")
    table = folder / "table.jsonl"
    keep_json_lines(table, PAIRS)
    tokenizer = train_tokenizer([row["query"] + row["response"] for row in PAIRS], 280)
    for seed, name in enumerate(("start", "another")):
        model = fresh_causal_lm(
            family="llama",
            tokenizer=tokenizer,
            context=96,
            hidden_size=32,
            layers=2,
            heads=2,
            seed=seed,
        )
        save_model(folder / name, model, tokenizer, QUESTION_ANSWER)
    lora = LoraConfig(r=4)
    given: dict[str, Any] = {"data": str(table), **STEPS}
    start = str(folder / "start")

    def run(stage: str, name: str, config: Any) -> None:
        run_stage(stage, config, folder / name, seed=1, console=QUIET)

    run("sft", "sft", SftConfig(model=start, lora=lora, block=64, **given))
    rank3 = replace(lora, r=3)
    sft = str(folder / "sft" / "model")
    run("reward", "reward", RewardConfig(model=sft, lora=rank3, **given))
    run("reward", "full", RewardConfig(model=sft, **given))
    run("reward", "on_start", RewardConfig(model=start, lora=rank3, **given))
    run("reward", "on_another", RewardConfig(model=str(folder / "another"), lora=rank3, **given))
    return folder


Build = Callable[..., PpoConfig]


@pytest.fixture
def config(made: Path) -> Build:
    """A shared base by default."""
    return partial(configured, made)


def configured(made: Path, **more: Any) -> PpoConfig:
    """Options of the policy stage; models are named within `made`."""
    given: dict[str, Any] = {
        "model": "sft/model",
        "reward": "reward/adapter",
        "shared_base": True,
        "steps": 4,
        "batch_size": 4,
        "mini_batch_size": 2,
        "epochs": 2,
        "samples": 2,
        "save_every": 2,
        "learning_rate": 1e-2,
        "critic": CriticConfig(kind="reward_model"),
        "lora": LoraConfig(r=4),
        "response": ResponseConfig(max_tokens=8),
        "track": (),
        **more,
    }
    for name in ("model", "reward"):
        given[name] = str(made / given[name])  # an absolute path stays as it is
    return PpoConfig(data=str(made / "table.jsonl"), **given)


def parts_of(config: PpoConfig) -> PpoParts:
    """What the command line builds."""
    return ppo_parts(config, seed=1)


def answers(parts: PpoParts, config: PpoConfig) -> tuple[list[str], list[str]]:
    """A few prompts and the policy's answers."""
    rollout = roll_out(parts, config.response, QUERIES[:6], 1, ("test", 0))
    return QUERIES[:6], [parts.codec.text_of(ids) for ids in rollout.responses]


def test_the_shared_reward_is_the_reward_model(made: Path, config: Build) -> None:
    """The same scores as of the stage's own model, merged and loaded apart."""
    c = config()
    parts = parts_of(c)
    texts = answers(parts, c)
    folder = str(made / "reward" / "model")
    apart = RewardModel(load_reward_model(folder), load_codec(folder, QUESTION_ANSWER))
    assert parts.reward(*texts) == pytest.approx(apart(*texts), abs=1e-5)
    assert len(set(parts.reward(*texts))) > 1


def test_the_critic_begins_as_the_reward_adapter(config: Build) -> None:
    """Its value of a whole text is the text's score."""
    c = config()
    parts = parts_of(c)
    assert isinstance(parts.critic, AdapterCritic)
    scope = parts.critic.states.scope
    ours = dict(scope.parameters("critic"))
    for name, weight in scope.parameters(REWARD):
        assert torch.equal(weight, ours[name.replace(f".{REWARD}.", ".critic.")])
        assert not weight.requires_grad
    assert all(weight.requires_grad for weight in parts.critic.module.parameters())


@pytest.mark.parametrize("kind", ["reward_model", "policy_copy", "value_head"])
def test_a_healthy_shared_base_passes_every_check(config: Build, kind: Any) -> None:
    """Each of the critics, on the recipe's own models."""
    c = config(critic=CriticConfig(kind=kind))
    found = run_checks(subject_of(parts_of(c), c, seed=1), console=QUIET)
    assert [finding.name for finding in found] == list(CHECKS)
    assert next(f for f in found if f.name == "head").applies


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("held", ["int8", "nf4"])
def test_rollout_and_update_are_one_function_on_a_quantised_base(config: Build, held: Any) -> None:
    """The first ratio is 1, the KL to the reference 0, and every weight that learns is reached."""
    c = config(lora=LoraConfig(r=4, base=held))
    found = run_checks(subject_of(parts_of(c), c, seed=1), QUICK, console=QUIET)
    measured = {finding.name: finding.measured for finding in found}
    assert measured["ratio"]["ratio_error"] < 1e-5
    assert measured["gradients"]["without_gradient"] == 0
    assert measured["roles"]["largest"] == 0.0


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy stage on a shared base, run to its end."""
    folder = tmp_path_factory.mktemp("finished") / "ppo"
    run_stage("ppo", configured(made), folder, seed=1, console=QUIET)
    return folder


def test_policy_and_critic_are_plain_folders(made: Path, finished: Path) -> None:
    """Each loads by itself; the merged policy is the adapter on its base; the critic has learnt."""
    merged = AutoModelForCausalLM.from_pretrained(finished / "model")
    adapted: Any = load_causal_lm(str(finished / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    critic: Any = load_reward_model(str(finished / "critic"))
    judge: Any = load_reward_model(str(made / "reward" / "adapter"))
    assert critic.config.num_labels == 1
    assert not torch.equal(critic.score.weight, judge.score.weight)
    rows = list(read_json_lines(finished / "metrics.jsonl"))
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["ppo/policy/first_ratio_error"] < 1e-4


class TestFaults:
    """What goes wrong with shared bases elsewhere, put in and seen."""

    def test_held_to_the_raw_base(self, config: Build) -> None:
        """Adapters off, where the policy goes on with a supervised adapter."""
        c = config(model="sft/adapter", reward="on_start/adapter")
        parts = parts_of(c)
        assert parts.policy.scope is not None
        raw = AdapterReference(parts.policy, parts.policy.scope)
        wrong = replace(parts, reference=raw)
        (found,) = run_checks(
            subject_of(wrong, c, seed=1), ["reference"], console=QUIET, only_report=True
        )
        assert not found.ok
        assert "ppo.reference.kind start" in found.fix

    def test_the_critic_computes_out_of_turn(
        self, config: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its backward pass would run under the policy's adapter."""
        c = config()
        monkeypatch.setattr(AdapterCritic, "turn", lambda _: nullcontext())
        subject = subject_of(parts_of(c), c, seed=1)
        (found,) = run_checks(subject, ["ratio"], console=QUIET, only_report=True)
        assert not found.ok
        assert "'default' while a graph of the adapter 'critic' is open" in found.what


def interrupt(config: PpoConfig, folder: Path, done: int) -> None:
    """Leave a run as a kill after `done` iterations does."""
    folder.mkdir()
    loop = PpoLoop(
        parts_of(config), config, folder=folder, seed=1, console=QUIET, log=lambda *_: None
    )
    whole = loop.iteration

    def iteration(step: int) -> dict[str, float]:
        if step == done:
            raise KeyboardInterrupt
        return whole(step)

    loop.iteration = iteration  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()


def test_an_interrupted_run_goes_on_bit_for_bit(
    config: Build, finished: Path, tmp_path: Path
) -> None:
    """Adapters and heads of all that learns are in the checkpoint."""
    interrupt(config(), tmp_path / "cut", 3)
    ppo(config(), tmp_path / "cut", seed=1, console=QUIET)
    for name in ("adapter", "critic"):
        one, other = (
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (finished, tmp_path / "cut")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [row["step"] for row in read_json_lines(tmp_path / "cut" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


def test_another_reference_does_not_go_on(made: Path, config: Build, tmp_path: Path) -> None:
    """The checkpoint tells which one it was."""
    interrupt(config(), tmp_path / "cut", 3)
    other = ReferenceConfig(kind="model", model=str(made / "another"))
    with pytest.raises(ModelError, match="iteration 2 was held to the reference"):
        ppo(config(reference=other), tmp_path / "cut", seed=1, console=QUIET)


LAYERS = ReferenceConfig(kind="layers", layers=1)
OWN: dict[str, Any] = {"shared_base": False, "lora": LoraConfig(), "reward": "full/model"}
"""All weights train, and reward model and reference are models of their own."""


@pytest.mark.parametrize("reference", [ReferenceConfig(), LAYERS], ids=["copy", "layers"])
def test_rounded_once_the_frozen_models_say_the_same(
    config: Build, reference: ReferenceConfig
) -> None:
    """Under the loop's autocast, bit for bit; what the policy holds as well stays as it is."""
    c = config(**OWN, reference=reference, precision="bf16")
    parts = parts_of(c)
    queries, texts = answers(parts, c)
    codec = parts.codec
    batch = token_batch(
        [codec.prompt_ids(query) for query in queries],
        [codec.response_ids(text, ended=True) for text in texts],
        codec.pad_id,
    )
    judge = parts.reward.reward
    assert isinstance(parts.reference, FrozenReference)
    assert isinstance(judge, RewardModel)

    def said() -> tuple[list[float], list[float]]:
        assert parts.reference is not None
        with parts.trainer.autocast():
            return list(judge(queries, texts)), parts.reference.logprobs(batch).tolist()

    before = said()
    hold_as_computed(parts)
    assert said() == before
    for model in (judge.model, parts.reference.model):
        assert any(p.dtype is torch.bfloat16 for p in model.parameters())
    assert all(p.dtype is torch.float32 for p in parts.policy.model.parameters())
    assert all(p.dtype is torch.float32 for p in parts.critic.module.parameters())


def test_a_run_goes_on_in_another_precision(config: Build, tmp_path: Path) -> None:
    """It is held to the same reference, rounded or not."""
    interrupt(config(**OWN, precision="fp32"), tmp_path / "cut", 3)
    ppo(config(**OWN, precision="bf16"), tmp_path / "cut", seed=1, console=QUIET)
    assert len(list(read_json_lines(tmp_path / "cut" / "metrics.jsonl"))) == 4


class TestReferences:
    """What the policy is held to."""

    def test_a_fresh_adapter_is_held_to_its_base(self, config: Build) -> None:
        """Switched off, nothing is copied."""
        parts = parts_of(config())
        assert isinstance(parts.reference, AdapterReference)
        assert parts.reference.adapter is None

    def test_an_adapter_gone_on_with_is_held_to_its_snapshot(
        self, made: Path, config: Build
    ) -> None:
        """Never to the raw base; the base is held once."""
        c = config(
            model="sft/adapter",
            reward="on_start/adapter",
            reference=ReferenceConfig(),
        )
        parts = parts_of(c)
        assert isinstance(parts.reference, AdapterReference)
        assert parts.reference.adapter == REFERENCE
        found = run_checks(subject_of(parts, c, seed=1), ["reference", "ratio"], console=QUIET)
        assert found[0].measured["kl"] == 0.0
        # It is the supervised model: the merged folder says the same.
        merged: Any = load_causal_lm(str(made / "sft" / "model"))
        ids = torch.tensor([[5, 6, 7, 8]])
        ours = parts.policy.logits(parts.policy(ids, torch.ones_like(ids) > 0).last_hidden_state)
        assert torch.allclose(merged(ids).logits, ours, atol=1e-4)
        scope = parts.policy.scope
        assert scope is not None
        before = parts.reference.identity()
        with torch.no_grad():
            for _, weight in scope.parameters(POLICY):
                weight.add_(0.1)
        assert parts.reference.identity() == before

    def test_all_weights_training_are_held_to_a_copy(self, config: Build) -> None:
        """A second model, frozen; offloading changes nothing on the processor."""
        c = config(**OWN)
        kept = config(**OWN, reference=ReferenceConfig(offload=True))
        one, other = parts_of(c).reference, parts_of(kept).reference
        assert isinstance(one, FrozenReference)
        assert isinstance(other, FrozenReference)
        assert one.identity() == other.identity()

    def test_shared_layers_are_the_same_tensors(self, config: Build) -> None:
        """And frozen in the policy; the others are copies that stay."""
        c = config(**OWN, reference=LAYERS)
        parts = parts_of(c)
        assert isinstance(parts.reference, FrozenReference)
        policy = dict(parts.policy.model.named_parameters())
        for name, held in parts.reference.model.named_parameters():
            mine = policy[name]
            front = "layers.1." not in name and not name.startswith("model.norm")
            assert (held.data_ptr() == mine.data_ptr()) is front
            assert mine.requires_grad is not front
        found = run_checks(
            subject_of(parts, c, seed=1), ["reference", "gradients", "ratio"], console=QUIET
        )
        assert all(finding.ok for finding in found)

    def test_another_model(self, made: Path, config: Build) -> None:
        """Its KL is not zero at first, which is as it was asked."""
        c = config(reference=ReferenceConfig(kind="model", model=str(made / "another")))
        parts = parts_of(c)
        (found,) = run_checks(subject_of(parts, c, seed=1), ["reference"], console=QUIET)
        assert abs(found.measured["kl"]) > 0.01

    def test_none_has_no_penalty(self, config: Build, tmp_path: Path) -> None:
        """KL and coefficient are zero in every figure."""
        c = config(reference=ReferenceConfig(kind="none"), steps=2)
        run_stage("ppo", c, tmp_path / "out", seed=1, console=QUIET)
        for row in read_json_lines(tmp_path / "out" / "metrics.jsonl"):
            assert row["objective/kl"] == row["objective/kl_coef"] == 0.0
            assert row["ppo/mean_non_score_reward"] == 0.0


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"reward": "on_another/adapter"}, ModelError, "the policy stands on .*sft/model"),
        ({"reward": "on_start/adapter"}, ModelError, "the policy stands on .*sft/model"),
        ({"reward": "full/model"}, ModelError, "is not an adapter"),
        ({"reward": "reward/model"}, ModelError, "its adapter is .*reward/adapter"),
        ({"reward": "sft/adapter"}, ModelError, "no scoring head|stands on"),
        ({"lora": LoraConfig()}, ConfigError, "shared_base is true, but ppo.lora.r is 0"),
        ({"reference": LAYERS}, ConfigError, "shares all layers"),
        ({"reference": ReferenceConfig(kind="layers")}, ConfigError, "shares all layers|layers is"),
        ({"reference": ReferenceConfig(layers=1)}, ConfigError, "kind is start, and .*layers is 1"),
        ({"reference": ReferenceConfig(kind="model")}, ConfigError, "reference.model is None"),
        ({"reference": ReferenceConfig(offload=True)}, ConfigError, "is no copy"),
        ({"model": "sft/adapter", "reward": "on_start/adapter", "lora": LoraConfig(r=8)},
         ConfigError, "lora.r is 8, the adapter .* has rank 4"),
        ({"model": "on_start/adapter", "reward": "on_start/adapter", "lora": LoraConfig(r=3)},
         ModelError, "is a reward model's adapter"),
        ({"shared_base": False, "lora": LoraConfig(), "reward": "full/model",
          "reference": ReferenceConfig(kind="layers", layers=2)}, ConfigError, "layers is 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    config: Build, more: dict[str, Any], kind: type[SuasionError], message: str
) -> None:
    """By name, before anything is trained."""
    with pytest.raises(kind, match=message):
        parts_of(config(**more))


def test_other_weights_in_the_old_place_are_another_base(
    made: Path, config: Build, tmp_path: Path
) -> None:
    """The path still fits; a copy of the old base elsewhere does too."""
    copied = tmp_path / "copied"
    shutil.copytree(made / "sft" / "model", copied)
    parts_of(config(model=str(copied)))
    shutil.copy(made / "another" / "model.safetensors", copied / "model.safetensors")
    with pytest.raises(ModelError, match="other weights"):
        parts_of(config(model=str(copied)))


def test_another_tokenizer_is_refused(made: Path, config: Build, tmp_path: Path) -> None:
    """The reward adapter would read the policy's base with other tokens."""
    adapter = tmp_path / "reward"
    shutil.copytree(made / "reward" / "adapter", adapter)
    train_tokenizer(["quite other words in here, zebra"], 290).save_pretrained(adapter)
    with pytest.raises(ModelError, match="tokenizer that is not the policy's"):
        parts_of(config(reward=str(adapter)))


def test_a_recipe_hands_the_adapter_on() -> None:
    """With a shared base the policy stage gets the reward stage's adapter, else its model."""
    for shared, expected in ((True, "adapter"), (False, "model")):
        recipe = resolve(
            Recipe(
                name="r",
                out="out",
                sft=SftConfig(model="m", data="d"),
                reward=RewardConfig(data="d"),
                ppo=PpoConfig(data="d", shared_base=shared, lora=LoraConfig(r=4)),
            )
        )
        assert recipe.ppo is not None
        assert recipe.ppo.reward == str(Path("out") / "reward" / expected)
        assert recipe.ppo.model == str(Path("out") / "sft" / "model")
