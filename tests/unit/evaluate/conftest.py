"""A run folder as the stages leave it, small and invented, with any part left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "merge", "evaluate")
REWARD = {
    "accuracy": 0.664,
    "accuracy_low": 0.631,
    "accuracy_high": 0.695,
    "mean_chosen": 0.412,
    "mean_rejected": -0.388,
    "pairs": 812,
    "longer_wins_accuracy": 0.547,
}
RESULTS: dict[str, dict[str, Any]] = {
    "prepare": {},
    "pretrain": {"perplexity_before": 71.24, "perplexity_after": 38.9, "tokens": 1_254_400},
    "sft": {"perplexity_before": 38.9, "perplexity_after": 24.31, "tokens": 602_112},
    "reward": REWARD,
    "ppo": {"steps": 200, "score_first": -0.21, "score_last": 1.38, "kl_last": 5.62},
    "merge": {"max_difference": 3.1e-6},
    "evaluate": {
        "perplexity_before": 71.24,
        "perplexity_after": 24.31,
        "reward": REWARD,
        "reward_ceiling": 0.741,
        "compare": {
            "a": "runs/demo/sft/model", "b": "runs/demo/ppo/model",
            "prompts": 128, "score_a": -0.19, "score_b": 1.31,
            "gold_a": 1.02, "gold_b": 1.67, "win_rate": 0.633, "win_rate_low": 0.551,
            "win_rate_high": 0.713, "win_by": "gold", "length_a": 61.2, "length_b": 73.9,
            "kl": 5.41,
        },
    },
}  # fmt: skip
COUNTS = {"questions": 5210, "answers": 14_377, "pairs": {"train": 6120, "evaluation": 812}}
RECIPE = """\
name: demo
seed: 1
model: tiny-llama
data: {source: stackexchange, split: {sft: 0.4, reward: 0.3, policy: 0.2, evaluation: 0.1}}
ppo:
  steps: 200
  batch: 32
  learning_rate: 1.4e-5
  kl: {kind: adaptive, initial: 0.2, target: 6.0, horizon: 10000}
"""
QUERY = """How do I read a *large* file line by line in Python without loading it all?

I tried this, but memory grows until the process is killed:

```python
lines = open("big.txt").read().split("\\n")
for line in lines:
    handle(line)
```

The file has about 40 million lines & I only need each one **once**."""
BEFORE = """You can use readlines() and then go over the list.

```python
for line in open("big.txt").readlines():
    handle(line)
```"""
AFTER = """Iterate over the file object itself; it reads one line at a time:

```python
with open("big.txt") as lines:
    for line in lines:
        handle(line)
```

`read()` and `readlines()` both build the whole content in memory, which is why yours grows. \
The `with` block also closes the file if `handle` raises."""


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _loss_rows(start: float, end: float, steps: int, random: np.random.Generator) -> list[Any]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-4 * step / steps) + random.normal(0, 0.03)
        row = {"step": step, "loss": loss, "learning_rate": 1e-4 * (1 - step / steps)}
        if step % (steps // 10) == 0:
            row |= {"eval_loss": loss + 0.06, "eval_accuracy": 0.5 + 0.17 * step / steps}
        rows.append(row)
    return rows


def _ppo_rows(random: np.random.Generator) -> list[Any]:
    rows = []
    for step in range(200):
        share, noise = 1 - math.exp(-step / 70), random.normal(0, 1, 8)
        rows.append(
            {
                "step": step,
                "env/reward_mean": -0.2 + 1.6 * share + 0.12 * noise[0],
                "env/reward_std": 1.0 + 0.05 * noise[1],
                "objective/kl": 6 * share + 0.3 * share * noise[2],
                "objective/kl_coef": 0.2 * math.exp(-step / 400),
                "objective/entropy": 92 - 20 * share + noise[3],
                "ppo/loss/value": 0.4 * math.exp(-step / 30) + 0.06 + 0.01 * noise[4],
                "ppo/loss/policy": -0.012 + 0.003 * noise[5],
                "ppo/policy/approxkl": 0.004 + 0.001 * noise[6],
                "ppo/policy/clipfrac": 0.05 + 0.01 * noise[7],
                "ppo/policy/entropy": 1.9 - 0.3 * share,
                "ppo/mean_non_score_reward": -0.4 * share,
                "ppo/val/var_explained": 0.7 * share,
                "tokens/responses_len_mean": 61 + 12 * share + noise[1],
                "tokens/unfinished": 0.6 * math.exp(-step / 50),
                "time/ppo/total": 1.2,
            }
        )
    return rows


def _comparison_rows(random: np.random.Generator) -> list[Any]:
    rows = []
    for index in range(128):
        change, before = random.normal(0.55, 1.3), random.normal(1, 0.8)
        rows.append(
            {
                "query": QUERY if index % 2 else f"Why does query {index} use a full table scan?",
                "response_a": BEFORE,
                "response_b": AFTER if change > -2 else "```\n" * 12,
                "score_a": before - 1,
                "score_b": before + 0.4 + change / 2,
                "gold_a": before,
                "gold_b": before + (change if index % 16 else 0),
                "length_a": 47,
                "length_b": 82,
            }
        )
    return rows


def _sample_rows() -> list[Any]:
    return [
        {
            "step": step,
            "index": index,
            "query": QUERY if index == 0 else f"What does `yield` do in case {index}?",
            "response": (BEFORE if step < 100 else AFTER) + f"\n\nStep {step}.",
            "score": -0.3 + step / 120 + index / 10,
        }
        for step in range(0, 201, 20)
        for index in range(3)
    ]


def _manifest(stage: str, position: int) -> dict[str, Any]:
    manifest = {
        "stage": stage,
        "status": "complete",
        "config": {"learning_rate": 1.4e-5, "note": "as resolved"},
        "inputs": {"base": f"{position:02d}" + "ab" * 31, "pairs.jsonl": "cd" * 32},
        "outputs": {"model.safetensors": "ef" * 32},
        "versions": {"suasion": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seed": 1,
        "commit": "3f2a9c81d0b7e64f5a1c2d3e4f5061728394a5b6",
        "seconds": (4.2, 96.0, 71.3, 118.8, 402.6, 3.1, 58.4)[position],
        "result": RESULTS[stage],
    }
    return manifest | ({"counts": COUNTS} if stage == "prepare" else {})


def build_run(folder: Path, stages: tuple[str, ...] = STAGES) -> Path:
    """Write the parts of a run that `stages` leave behind below `folder`."""
    random = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for stage in stages:
        path = folder / stage / "manifest.json"
        path.parent.mkdir()
        manifest = _manifest(stage, STAGES.index(stage))
        path.write_text(json.dumps(manifest), encoding="utf-8")
    losses = {"pretrain": (4.3, 3.66, 300), "sft": (3.7, 3.19, 150), "reward": (0.71, 0.58, 400)}
    for stage, (start, end, steps) in losses.items():
        if stage in stages:
            _lines(folder / stage / "metrics.jsonl", _loss_rows(start, end, steps, random))
    if "ppo" in stages:
        _lines(folder / "ppo" / "metrics.jsonl", _ppo_rows(random))
        _lines(folder / "ppo" / "samples.jsonl", _sample_rows())
        warning = {"step": 140, "message": "12 of 32 answers reached the length limit"}
        _lines(folder / "ppo" / "warnings.jsonl", [warning])
    if "evaluate" in stages:
        _lines(folder / "evaluate" / "comparisons.jsonl", _comparison_rows(random))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Builds `tmp_path/demo` with the stages asked for, all by default."""

    def make(*stages: str) -> Path:
        return build_run(tmp_path / "demo", stages or STAGES)

    return make
