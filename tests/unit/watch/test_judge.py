"""Checks on the reward: each finds the fault put into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from suasion.config.schema import QUESTION_ANSWER, LoraConfig
from suasion.models.adapters import add_lora
from suasion.models.load import load_codec, load_reward_model, new_reward_model, save_model
from suasion.rollout.rewards import Checked, load_reward
from suasion.trainers.sft import save_trained
from suasion.watch import judge
from suasion.watch.subject import Subject
from tests.unit.watch.conftest import Build, again

Score = Any
"""A reward whose arguments may have other names."""


def scored_by(subject: Subject, score: Score) -> Subject:
    """The subject with a function for its reward."""
    return replace(again(subject, reward=Checked(score, "test")), reward_source="test:score")


def length(_: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A sound reward."""
    return [float(len(response)) for response in responses]


def by_rank(_: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Only the order within the batch counts."""
    order = sorted(responses, key=len)
    return [float(order.index(response)) for response in responses]


def by_place(_: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Results that were not put back into the order of the texts."""
    return [float(place) for place in range(len(responses))]


def whitened(_: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The batch is normalised."""
    mean = sum(map(len, responses)) / len(responses)
    return [len(response) - mean for response in responses]


class Drifting:
    """Never the same twice."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, queries: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Longer texts score higher, later calls too."""
        self._calls += 1
        return [float(len(response) + self._calls) for response in responses]


class TestReward:
    """One finite, repeatable number for each text."""

    @pytest.mark.parametrize(
        ("score", "said"),
        [
            (by_place, "order of the batch"),
            (by_rank, "other texts in the batch"),
            (whitened, "other texts in the batch"),
            (Drifting(), "the same call gives other scores"),
            (lambda _, responses: [1.5 for _ in responses], "texts, the empty one too"),
            (lambda _, responses: [math.nan for _ in responses], "returned nan"),
            (lambda _, responses: [1 / len(r) if r else math.inf for r in responses], "inf"),
            (lambda *_: [0.5], "returned 1 scores"),
        ],
        ids=["place", "rank", "whitened", "drift", "constant", "nan", "empty", "count"],
    )
    def test_faults(self, build: Build, score: Score, said: str) -> None:
        """Each kind, with what is said about it."""
        found = judge.reward(scored_by(build(), score))
        assert not found.ok
        assert said in found.what

    def test_sound_function(self, build: Build) -> None:
        """Length is a function of one text."""
        found = judge.reward(scored_by(build(), length))
        assert found.ok
        assert found.measured["alone"] == 0.0

    def test_score_read_at_the_end_of_the_row(self, build: Build) -> None:
        """Where the longest text of the batch decides how much padding the others end in."""
        subject = build()
        source = Path(subject.reward_source)
        codec = load_codec(str(source), QUESTION_ANSWER)
        model: Any = load_reward_model(str(source))

        @torch.no_grad()
        def score(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
            rows = [
                [*codec.prompt_ids(q), *codec.judged_ids(r)]
                for q, r in zip(queries, responses, strict=True)
            ]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [codec.pad_id] * (longest - len(row)) for row in rows])
            hidden = model.base_model(input_ids=ids).last_hidden_state[:, -1]
            return model.score(hidden).squeeze(-1).tolist()

        found = judge.reward(scored_by(subject, score))
        assert not found.ok
        assert "other texts" in found.what

    def test_untrained_head(self, build: Build) -> None:
        """A head of zeros gives every text the same score."""
        subject = build()
        torch.nn.init.zeros_(subject.parts.reward.reward.model.score.weight)  # type: ignore[attr-defined]
        assert not judge.reward(subject).ok


@pytest.fixture
def trained(build: Build, tmp_path: Path) -> Callable[..., Subject]:
    """A reward model with its `adapter` and merged `model`, as the stage leaves them."""

    def made(family: str) -> Subject:
        subject = build(family)
        base = Path(subject.reward_source).parent / "policy"
        codec = load_codec(str(base), QUESTION_ANSWER)
        model = add_lora(
            new_reward_model(str(base), codec.pad_id, torch.float32, seed=0),
            LoraConfig(r=4),
            head=True,
        )
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        save_trained(tmp_path, model, codec.tokenizer, QUESTION_ANSWER, LoraConfig())
        source = str(tmp_path / "model")
        with_it = again(subject, reward=load_reward(source, QUESTION_ANSWER))
        return replace(with_it, reward_source=source)

    return made


def change(file: Path, part: str, how: Callable[[Any], Any]) -> None:
    """Change the tensors whose names have `part` in a safetensors file; None drops them."""
    tensors = {
        name: how(tensor) if part in name else tensor for name, tensor in load_file(file).items()
    }
    save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})


class TestHead:
    """The scoring head survives save, merge and reload."""

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_survives(self, trained: Callable[..., Subject], family: str) -> None:
        """All four ways to get the model again."""
        found = judge.head(trained(family))
        assert found.ok, found.what
        assert set(found.measured) == {
            "reloaded",
            "transformers",
            "merged",
            "saved",
            "tolerance",
        }

    def test_dropped_from_the_merged_model(self, trained: Callable[..., Subject]) -> None:
        """The folder has no head at all."""
        subject = trained("llama")
        change(Path(subject.reward_source) / "model.safetensors", "score", lambda _: None)
        found = judge.head(subject)
        assert not found.ok
        assert "score.weight" in found.what

    def test_dropped_from_the_adapter(self, trained: Callable[..., Subject]) -> None:
        """A fresh head is drawn when the adapter is merged."""
        subject = trained("llama")
        adapter = Path(subject.reward_source).parent / "adapter" / "adapter_model.safetensors"
        change(adapter, "score", lambda _: None)
        found = judge.head(subject)
        assert not found.ok

    def test_another_one_on_the_disk(self, trained: Callable[..., Subject]) -> None:
        """The model in use is not what the folder holds."""
        subject = trained("llama")
        file = Path(subject.reward_source) / "model.safetensors"
        change(file, "score", lambda weight: weight * 1.2)
        found = judge.head(subject)
        assert not found.ok
        assert "reloaded by" in found.what

    def test_merged_with_another_adapter(self, trained: Callable[..., Subject]) -> None:
        """Base and adapter give another model than the merged one."""
        subject = trained("llama")
        adapter = Path(subject.reward_source).parent / "adapter" / "adapter_model.safetensors"
        change(adapter, "lora_B", lambda weight: weight * 0.5)
        found = judge.head(subject)
        assert not found.ok
        assert "merged by" in found.what
        assert "reloaded" not in found.what

    def test_a_function_has_none(self, build: Build) -> None:
        """Only a model folder has a head."""
        assert not judge.head(scored_by(build(), length)).applies


class TestTemplates:
    """One template in every stage."""

    def test_same(self, build: Build) -> None:
        """Stage, policy folder and reward folder."""
        found = judge.templates(build())
        assert found.ok
        assert found.measured == {"different": 1, "known": 3, "unknown": 0}

    def test_changed(self, build: Build) -> None:
        """One stage of the recipe has another."""
        subject = build()
        known = {**subject.templates, "sft": "Q: {query} A: {response}"}
        found = judge.templates(replace(subject, templates=known))
        assert not found.ok
        assert "sft 'Q: {query} A: {response}'" in found.what

    def test_a_folder_that_does_not_say(self, build: Build) -> None:
        """It counts as unknown, not as a fault."""
        subject = build()
        known = {**subject.templates, "policy model": None}
        found = judge.templates(replace(subject, templates=known))
        assert found.ok
        assert found.measured["unknown"] == 1


@pytest.fixture
def classifier(build: Build, tmp_path: Path) -> Path:
    """A classifier with two labels, drawn at random."""
    source = Path(build().reward_source)
    codec = load_codec(str(source), QUESTION_ANSWER)
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(
        source.parent / "policy",
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = codec.pad_id
    save_model(tmp_path / "classifier", model, codec.tokenizer, QUESTION_ANSWER)
    return tmp_path / "classifier"


class TestLabel:
    """The label is picked by its name."""

    def test_by_name(self, build: Build, classifier: Path) -> None:
        """As a recipe names it."""
        source = f"pipeline:{classifier}#POSITIVE"
        subject = again(build(), reward=load_reward(source, QUESTION_ANSWER))
        found = judge.label(replace(subject, reward_source=source))
        assert found.ok, found.what
        assert found.measured["largest"] < 1e-5

    def test_by_position(self, build: Build, classifier: Path) -> None:
        """Pipelines sort their answer, so the first label is the likeliest one."""
        from transformers import pipeline

        pipe: Any = pipeline("text-classification", model=str(classifier), top_k=None)

        def first(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
            texts = [q + r for q, r in zip(queries, responses, strict=True)]
            return [row[0]["score"] for row in pipe(texts, function_to_apply="none")]

        subject = scored_by(build(), first)
        found = judge.label(replace(subject, reward_source=f"pipeline:{classifier}#POSITIVE"))
        assert not found.ok
        assert "by its position" in found.likely_cause

    def test_no_such_label(self, build: Build, classifier: Path) -> None:
        """The labels there are are told."""
        source = f"pipeline:{classifier}#GOOD"
        found = judge.label(replace(build(), reward_source=source))
        assert not found.ok
        assert "NEGATIVE, POSITIVE" in found.fix

    def test_no_pipeline(self, build: Build) -> None:
        """Other rewards have no labels."""
        assert not judge.label(build()).applies
