"""The pipeline on bases in 8 and 4 bits, through the command line."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.e2e.commands import Commands, lines, read

FIT = shlex.split("--max_steps 2 --batch_size 4 --threads 1 --lora.r 4 --lora.base int8")
PPO = shlex.split(
    "--steps 2 --batch_size 4 --mini_batch_size 2 --response.max_tokens 8 --samples 1 --threads 1"
    " --lora.r 4 --lora.base int8 --lora.checkpointing true --shared_base true"
    " --critic.kind reward_model"
)


def test_every_stage_on_an_int8_base(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """Supervised adapter, merged with a receipt, reward adapter, and every role on one base."""
    data = ("--data", demo / "prepare")
    sft, merged, reward, ppo = (tmp_path / name for name in ("sft", "merged", "reward", "ppo"))
    start = ("--model", demo / "pretrain" / "model")
    suasion.done("sft", *start, *data, "--out", sft, *FIT, "--block", 64, "--lora.merge", "false")
    assert read(sft / "adapter" / "suasion.json")["base"]["held"] == "int8"

    suasion.done("merge", "--model", sft / "adapter", *data, "--out", merged)
    receipt = read(merged / "merge.json")
    assert receipt["base_held"] == "int8"
    assert receipt["largest_difference"] < 1e-4
    base = ("--model", merged / "model")
    AutoModelForCausalLM.from_pretrained(merged / "model")

    suasion.done("reward", *base, *data, "--out", reward, *FIT)
    found = AutoModelForSequenceClassification.from_pretrained(reward / "model")
    assert found.config.num_labels == 1

    suasion.done("ppo", *base, "--reward", reward / "adapter", *data, "--out", ppo, *PPO)
    first = lines(ppo / "metrics.jsonl")[0]
    assert abs(first["objective/kl"]) < 1e-3
    assert first["ppo/policy/first_ratio_error"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(ppo / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_in_four_bits_and_in_sixteen(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """A policy on each; the model that comes out is plain, in the type that was asked for."""
    inputs = ("--model", demo / "sft/model", "--reward", demo / "reward/model")
    for held in ("nf4", "bf16"):
        out = tmp_path / held
        options = ("--lora.r", 4, "--lora.base", held, "--lora.merge_dtype", "bf16")
        steps = (*PPO[:10], "--data", demo / "prepare", "--out", out)
        suasion.done("ppo", *inputs, *steps, *options)
        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
        assert model.dtype is torch.bfloat16


def test_a_quantised_base_needs_adapters(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """And the message names the option."""
    inputs = ("--model", demo / "pretrain/model", "--data", demo / "prepare")
    options = ("--out", tmp_path / "out", "--lora.base", "int8")
    message = suasion.refused(2, "sft", *inputs, *options)
    assert "sft.lora.base is int8, but sft.lora.r is 0" in message
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(
    suasion: Commands, demo: Path, tmp_path: Path
) -> None:
    """Same shape, other weights."""
    data = ("--data", demo / "prepare")
    adapter = tmp_path / "sft" / "adapter"
    suasion.done("sft", "--model", demo / "pretrain/model", *data, "--out", tmp_path / "sft", *FIT)
    settings = adapter / "adapter_config.json"
    written = settings.read_text("utf-8")
    settings.write_text(
        written.replace(str(demo / "pretrain/model"), str(demo / "sft/model")), "utf-8"
    )
    message = suasion.refused(4, "merge", "--model", adapter, *data, "--out", tmp_path / "merged")
    assert "trained on other weights" in message
