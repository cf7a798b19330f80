"""TRL 1.12.0, the last release with a PPO trainer: a separate critic, the reward in the loop.

python -m benchmarks.speed.trl_last TASK FOLDER, in the environment of peers/last.txt.
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
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.speed.probe import Probe
from benchmarks.speed.task import Task


class Timed:
    """Marks the phases of the trainer's loop from outside, by wrapping what it calls.

    Args:
        probe: Measures.
        eos: Ends a response.
        pad: Fills prompts.
    """

    def __init__(self, probe: Probe, eos: int, pad: int) -> None:
        self._probe = probe
        self._eos = eos
        self._pad = pad
        self._generate = ppo_trainer.batch_generation
        self._forward = ppo_trainer.forward
        self._prompts: list[int] = []
        self._responses: list[int] = []
        self._updating = False

    def install(self) -> None:
        """Wrap."""
        ppo_trainer.batch_generation = self.batch_generation
        ppo_trainer.forward = self.forward

    def batch_generation(self, model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        """Begins an iteration and ends the one before."""
        self.end()
        self._probe.start()
        found, logits = self._generate(model, queries, *rest)
        self._probe.mark("rollout")
        self._updating = False
        self._prompts = (queries != self._pad).sum(-1).tolist()
        answers = found[:, queries.shape[1] :]
        ended = (answers == self._eos).int()
        self._responses = ((ended.cumsum(-1) - ended) == 0).sum(-1).tolist()
        return found, logits

    def forward(self, model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        """The first pass of policy and critic together begins the update.

        Positions are counted here: the trainer replaces padding before the model sees it.
        """
        self._probe.count(ids, self._pad)
        if hasattr(model, "value_model") and not self._updating:
            self._probe.mark("scoring")
            self._updating = True
        return self._forward(model, ids, *rest)

    def end_update(self) -> None:
        """Statistics are logged once the update is done."""
        self._probe.mark("update")

    def end(self) -> None:
        """Report the iteration, if there is one."""
        if self._probe.running:
            self._probe.stop(self._prompts, self._responses)


def trainer_of(task: Task, folder: Path, scratch: str, timed: Timed) -> PPOTrainer:
    """A trainer on the task's models, which logs to the clock alone."""
    kind = torch.bfloat16 if task.precision == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=kind)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=kind)
    judge, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=kind)
        for _ in range(2)
    )
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["query"])["input_ids"] for line in lines]

    class Quiet(PPOTrainer):
        """Tells the clock when an update is over."""

        def log(self, *arguments: Any, **named: Any) -> None:
            timed.end_update()

    config = PPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=task.epochs,
        total_episodes=task.iterations * task.batch,
        response_length=task.response,
        temperature=1.0,
        stop_token="eos",  # noqa: S106 (not a password)
        learning_rate=1e-6,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    return Quiet(
        config,
        tokenizer,
        policy,
        reference,
        judge,
        Dataset.from_dict({"input_ids": ids}),
        critic,
    )


def main(text: str, root: str) -> None:
    """Do one task."""
    task = Task.parse(text)
    folder = task.folder(Path(root))
    if task.matmul == "fast":
        torch.set_float32_matmul_precision("medium")
    size = task.vocabulary_size
    probe = Probe()
    timed = Timed(probe, eos=size - 2, pad=size - 1)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(task, folder, scratch, timed)
        timed.install()
        trainer.train()
        timed.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
