"""A tiny policy stage, built by the same code as a real one, from models drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from suasion.cli.build import ppo_parts
from suasion.config.schema import QUESTION_ANSWER, LoraConfig, PpoConfig, ResponseConfig
from suasion.core.files import keep_json_lines
from suasion.models.load import (
    fresh_causal_lm,
    load_codec,
    new_reward_model,
    save_model,
    train_tokenizer,
)
from suasion.trainers.ppo import PpoParts
from suasion.watch.subject import Subject, subject_of

QUERIES = [f"How many are {n} and {'one ' * (n % 4)}{n + 1}?" for n in range(12)]
ANSWERS = [f"They are {2 * n + 1}." for n in range(12)]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a folder with `policy` and `reward`, made once."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = make_models(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder_of


def make_models(folder: Path, family: str) -> Path:
    """A policy and a reward model of one family, and prompts."""
    tokenizer = train_tokenizer([q + a for q, a in zip(QUERIES, ANSWERS, strict=True)], 270)
    model = fresh_causal_lm(
        family=family, tokenizer=tokenizer, context=96, hidden_size=32, layers=2, heads=2, seed=1
    )
    with torch.no_grad():  # sharper than the library draws it, so that faults show as they do later
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    save_model(folder / "policy", model, tokenizer, QUESTION_ANSWER)
    codec = load_codec(str(folder / "policy"), QUESTION_ANSWER)
    judge = new_reward_model(str(folder / "policy"), codec.pad_id, torch.float32, seed=0)
    save_model(folder / "reward", judge, tokenizer, QUESTION_ANSWER)
    keep_json_lines(folder / "queries.jsonl", [{"query": query} for query in QUERIES])
    return folder


Stage = Callable[..., tuple[PpoParts, PpoConfig]]
Build = Callable[..., Subject]


@pytest.fixture
def stage(models: Callable[[str], Path]) -> Stage:
    """(family, rank, **PpoConfig) -> the parts of a policy stage and its configuration."""

    def made(family: str = "llama", rank: int = 0, **more: Any) -> tuple[PpoParts, PpoConfig]:
        return parts(models(family), rank, more)

    return made


@pytest.fixture
def build(stage: Stage) -> Build:
    """The same, as a subject of the checks."""

    def made(*kind: Any, **more: Any) -> Subject:
        return subject_of(*stage(*kind, **more), seed=3)

    return made


def parts(folder: Path, rank: int, more: dict[str, Any]) -> tuple[PpoParts, PpoConfig]:
    """What the command line builds; the global stream of random numbers is kept."""
    config = PpoConfig(
        **{
            "model": str(folder / "policy"),
            "reward": str(folder / "reward"),
            "data": str(folder / "queries.jsonl"),
            "response": ResponseConfig(max_tokens=12),
            "lora": LoraConfig(r=rank),
            "track": (),
            **more,
        }
    )
    with torch.random.fork_rng():
        return ppo_parts(config, seed=1), config


def again(subject: Subject, **changed: Any) -> Subject:
    """The subject with other parts, without another rollout."""
    return replace(subject, parts=replace(subject.parts, **changed))
