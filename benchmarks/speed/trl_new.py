"""TRL 1.16.0: supervised steps on packed texts, and reward-model steps on pairs.

python -m benchmarks.speed.trl_new TASK FOLDER, in the environment of peers/new.txt.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.speed.probe import Probe
from benchmarks.speed.steps import mean_texts, timed_steps
from benchmarks.speed.task import BLOCK, Task


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options(task: Task, scratch: str) -> dict[str, Any]:
    """What both trainers are told; precision and checkpointing only where the task asks."""
    found: dict[str, Any] = {
        "output_dir": scratch,
        "per_device_train_batch_size": task.batch,
        "max_steps": task.iterations,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    if task.precision != "default":
        found |= {"bf16": task.precision == "bf16", "gradient_checkpointing": False}
    return found


def supervised(task: Task, folder: Path, scratch: str, probe: Probe) -> None:
    """Blocks of BLOCK tokens, cut where they are full."""
    texts = [f"{row['query']} {row['response']}" for row in rows(folder / "texts.jsonl")]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        args=SFTConfig(
            max_length=BLOCK,
            packing=True,
            packing_strategy="wrapped",
            **options(task, scratch),
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    with timed_steps(probe, [BLOCK] * task.batch, task.vocabulary_size):
        trainer.train()


def judge(task: Task, folder: Path, scratch: str, probe: Probe) -> None:
    """Pairs of whole texts."""
    pairs = rows(folder / "pairs.jsonl")
    data = {
        name: [f"{row['query']} {row[name]}" for row in pairs] for name in ("chosen", "rejected")
    }
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(max_length=None, **options(task, scratch)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
    )
    with timed_steps(probe, mean_texts(folder, task.batch), task.vocabulary_size):
        trainer.train()


def main(text: str, root: str) -> None:
    """Do one task."""
    task = Task.parse(text)
    if task.matmul == "fast":
        torch.set_float32_matmul_precision("medium")
    work = {"sft": supervised, "reward": judge}[task.work]
    with tempfile.TemporaryDirectory() as scratch:
        work(task, task.folder(Path(root)), scratch, Probe())


if __name__ == "__main__":
    main(*sys.argv[1:])
