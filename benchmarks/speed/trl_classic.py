"""TRL 0.11.4: the loop of its own examples around generate, reward and step.

python -m benchmarks.speed.trl_classic TASK FOLDER, in the environment of peers/classic.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

from benchmarks.speed.probe import Probe
from benchmarks.speed.task import LORA_ALPHA, LORA_RANK, Task

LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""Every linear layer except the head."""
SCORED = ("forward_pass", "compute_rewards", "compute_advantages")


def trainer_of(task: Task, folder: Path, kind: torch.dtype) -> PPOTrainer:
    """A trainer on the task's models."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    options: dict[str, Any] = {"torch_dtype": kind}
    if task.lora:
        options["peft_config"] = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=LINEAR[task.family],
            fan_in_fan_out=task.family == "gpt2",
            task_type="CAUSAL_LM",
        )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "policy"), **options)
    config = PPOConfig(
        batch_size=task.batch,
        mini_batch_size=task.batch,
        gradient_accumulation_steps=1,
        ppo_epochs=task.epochs,
        learning_rate=1e-6,
        seed=1,
    )
    return PPOTrainer(
        config,
        model,
        ref_model=None if task.lora else create_reference_model(model),
        tokenizer=tokenizer,
    )


def main(text: str, root: str) -> None:
    """Do one task."""
    task = Task.parse(text)
    folder = task.folder(Path(root))
    if task.matmul == "fast":
        torch.set_float32_matmul_precision("medium")
    kind = torch.bfloat16 if task.precision == "bf16" else torch.float32
    trainer = trainer_of(task, folder, kind)
    judge = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", torch_dtype=kind
    ).eval()
    tokenizer = trainer.tokenizer
    judge.config.pad_token_id = tokenizer.pad_token_id
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line)["query"] for line in lines]
    probe = Probe()
    probe.watch(trainer.model.pretrained_model.get_input_embeddings())
    for step in range(task.iterations):
        part = queries[step * task.batch : (step + 1) * task.batch]
        probe.start()
        prompts = [tokenizer(query, return_tensors="pt")["input_ids"][0] for query in part]
        answers = trainer.generate(
            prompts,
            batch_size=task.batch,
            return_prompt=False,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=task.response,
            pad_token_id=tokenizer.pad_token_id,
        )
        probe.mark("rollout")
        texts = [
            f"{query} {tokenizer.decode(answer, skip_special_tokens=True)}{tokenizer.eos_token}"
            for query, answer in zip(part, answers, strict=True)
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            scores = judge(**inputs).logits[:, 0].float()
        probe.mark("scoring")
        stats = trainer.step(prompts, list(answers), list(scores))
        scoring = sum(float(stats[f"time/ppo/{name}"]) for name in SCORED)
        probe.split({"scoring": scoring, "update": float(stats["time/ppo/optimize_step"])})
        probe.stop([len(p) for p in prompts], [len(a) for a in answers])


if __name__ == "__main__":
    main(*sys.argv[1:])
