"""Stages called on their own: inputs named, tables of one's own, adapters, critics, rewards."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.e2e.commands import Commands, lines, read

PPO = shlex.split(
    "--steps 1 --batch_size 4 --mini_batch_size 2 --response.max_tokens 8 --samples 1 --threads 1"
)
FIT = shlex.split("--max_steps 2 --batch_size 4 --threads 1")

REWARDS = """
def length(queries, responses):
    assert len(queries) == len(responses)
    return [float(len(text)) for text in responses]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rewards.py."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_rewards.py").write_text(REWARDS, "utf-8")
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSON-lines table."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_prepare_counts_what_it_wrote(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """The manifest has the counts, and they are those of the files."""
    suasion.done("prepare", "stackexchange", demo / "dump", "--out", tmp_path / "data")
    counts = read(tmp_path / "data" / "manifest.json")["counts"]
    assert counts["questions"] == 250
    assert counts["pairs_unequal"] >= counts["pairs"] > 0
    for split, tables in counts["splits"].items():
        for table, count in tables.items():
            path = tmp_path / "data" / split / f"{table}.parquet"
            assert pq.read_metadata(path).num_rows == count
    assert sum(tables["queries"] for tables in counts["splits"].values()) == 250


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_adapters_end_in_a_plain_model(
    suasion: Commands, demo: Path, tmp_path: Path, stage: str
) -> None:
    """The merged folder loads without peft, has no missing weights, and has moved."""
    model = demo / "sft" / "model"
    inputs = ("--model", model, "--data", demo / "prepare", "--out", tmp_path / "out")
    suasion.done(stage, *inputs, *FIT, "--lora.r", 4, "--learning_rate", "1e-2")
    auto: Any = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    loaded, report = auto.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(model / "model.safetensors")[name]
    assert not torch.equal(loaded.state_dict()[name], before)
    AutoTokenizer.from_pretrained(tmp_path / "out" / "model")


def test_policy_with_adapters(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """The reference is the base with its adapters off; at first it is the policy itself."""
    inputs = ("--model", demo / "sft/model", "--reward", demo / "reward/model")
    out = tmp_path / "out"
    suasion.done("ppo", *inputs, "--data", demo / "prepare", "--out", out, *PPO, "--lora.r", 4)
    assert abs(lines(out / "metrics.jsonl")[0]["objective/kl"]) < 1e-3
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).logits.shape[:2] == (1, 3)
    said = suasion.done("generate", "--model", out / "model", "--prompt", "42", *PPO[6:8])
    assert said.strip()


@pytest.mark.parametrize("kind", ["reward_model", "policy_copy"])
def test_critics_apart(suasion: Commands, demo: Path, tmp_path: Path, kind: str) -> None:
    """A critic of its own is saved as a whole model."""
    inputs = ("--model", demo / "sft/model", "--reward", demo / "reward/model")
    out = tmp_path / "out"
    options = ("--data", demo / "prepare", "--out", out, "--critic.kind", kind)
    suasion.done("ppo", *inputs, *options, *PPO)
    critic = AutoModelForSequenceClassification.from_pretrained(out / "critic")
    assert critic.config.num_labels == 1
    assert read(out / "manifest.json")["result"]["critic"] == kind


@pytest.mark.parametrize("name", ["my_rewards:length", "my_rewards.py:length"])
def test_functions_as_rewards(
    suasion: Commands, demo: Path, rewards: Path, tmp_path: Path, name: str
) -> None:
    """By module or by file, found from the folder one stands in."""
    inputs = ("--model", demo / "sft/model", "--reward", name, "--data", demo / "prepare")
    suasion.done("ppo", *inputs, "--out", tmp_path / "out", *PPO, cwd=rewards)
    assert lines(tmp_path / "out" / "metrics.jsonl")[0]["env/reward_mean"] > 0


def test_a_changed_reward_file_runs_the_stage_again(
    suasion: Commands, demo: Path, tmp_path: Path
) -> None:
    """Its contents are an input like any other."""
    file = tmp_path / "judge.py"
    file.write_text(REWARDS, "utf-8")
    inputs = ("--model", demo / "sft/model", "--data", demo / "prepare")
    command = ("ppo", *inputs, "--reward", f"{file}:length", "--out", tmp_path / "out", *PPO)
    suasion.done(*command)
    assert "already done" in suasion.done(*command)
    file.write_text(REWARDS.replace("float(len(text))", "-float(len(text))"), "utf-8")
    assert "reward: other content" in suasion.done(*command)
    assert lines(tmp_path / "out" / "metrics.jsonl")[0]["env/reward_mean"] < 0


def test_a_label_of_a_classifier_as_reward(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """Found by its name; a label that is not there is refused with those that are."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "sft/model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "rude", 1: "kind", 2: "odd"},
        label2id={"rude": 0, "kind": 1, "odd": 2},
    )
    folder = tmp_path / "classifier"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = ("--model", demo / "sft/model", "--data", demo / "prepare", "--out", tmp_path / "out")
    suasion.done("ppo", *inputs, "--reward", f"pipeline:{folder}#kind", *PPO)
    other = (*inputs[:-1], tmp_path / "other")
    message = suasion.refused(2, "ppo", *other, "--reward", f"pipeline:{folder}#kidn", *PPO)
    assert "no label 'kidn'" in message
    assert "rude, kind, odd" in message
    assert not (tmp_path / "other").exists()


def test_tables_of_ones_own(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """sft, reward, ppo, evaluate and generate from JSON lines, without any prepared folder."""
    numbers = range(40)
    answers = write_rows(
        tmp_path / "answers.jsonl",
        [{"query": f"What is {n}?", "response": f"It is a number, {n}."} for n in numbers],
    )
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"query": f"What is {n}?", "chosen": "A number.", "rejected": "No."} for n in numbers],
    )
    queries = write_rows(tmp_path / "queries.jsonl", [{"query": f"What is {n}?"} for n in numbers])
    start = demo / "pretrain/model"
    sft, reward, ppo = (tmp_path / name for name in ("sft", "reward", "ppo"))
    suasion.done("sft", "--model", start, "--data", answers, "--out", sft, *FIT, "--block", 32)
    suasion.done("reward", "--model", sft / "model", "--data", pairs, "--out", reward, *FIT)
    judge = ("--reward", reward / "model")
    model = ("--model", sft / "model")
    suasion.done("ppo", *model, *judge, "--data", queries, "--out", ppo, *PPO)
    sides = ("--before", sft / "model", "--after", ppo / "model", "--response.max_tokens", 8)
    both = tmp_path / "both"
    suasion.done("evaluate", *sides, *judge, "--data", queries, "--prompts", 5, "--out", both)
    compared = read(both / "manifest.json")["result"]["compare"]
    assert 0 <= compared["win_rate"] <= 1
    assert len(lines(both / "comparisons.jsonl")) == 5
    written = tmp_path / "written.jsonl"
    options = ("--response.max_tokens", 8, "--limit", 3, "--greedy", "true")
    suasion.done("generate", *model, "--data", queries, "--out", written, *options)
    assert [row["query"] for row in lines(written)] == ["What is 0?", "What is 1?", "What is 2?"]


@pytest.mark.parametrize("prompt", ["42", "yes", "Rice: how long?", "- a list?", "2017-01-01"])
def test_a_prompt_is_text_whatever_it_looks_like(
    suasion: Commands, demo: Path, prompt: str
) -> None:
    """YAML would make numbers, mappings and dates of these."""
    options = ("--prompt", prompt, "--response.max_tokens", 4)
    suasion.done("generate", "--model", demo / "sft/model", *options)


def test_a_report_of_its_own(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """Written where one says."""
    page = tmp_path / "page.html"
    assert str(page) in suasion.done("report", demo, "--out", page)
    assert page.read_text("utf-8").startswith("<!")


@pytest.mark.parametrize(
    "words",
    [[], ["--version"], ["--help"], ["sft", "--help"], ["run", "--help"], ["demo", "-h"]],
)
def test_help_answers(suasion: Commands, words: list[str]) -> None:
    """On standard output, with exit code 0."""
    assert "suasion" in suasion.done(*words)
