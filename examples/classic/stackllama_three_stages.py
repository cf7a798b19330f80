#!/usr/bin/env python
"""StackLLaMA's three stages at the size of a thimble: supervised, reward, policy.

Packed fine-tuning with adapters that are merged, a reward model on pairs in columns j and k, then
PPO of new adapters with the reward model's score less a baseline. Same template, same order, same
arguments as the published scripts; only data and models are invented here.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    pipeline,
)

from suasion.classic import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
    set_seed,
)
from suasion.models.load import fresh_causal_lm, train_tokenizer

TOPICS = ["lists", "files", "dates", "loops", "types", "tests", "paths", "locks"]
ROWS = [
    {
        "question": f"How do I use {topic}?",
        "response_j": f"Read the page on {topic}, then try it.",
        "response_k": "Why would you?",
    }
    for topic in TOPICS
] * 8
REWARD_BASELINE = 0.5
EPOCHS = 6


def text_of(question: str, answer: str) -> str:
    """The template of every stage."""
    return f"Question: {question}\n\nAnswer: {answer}"


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 5,
        "dataloader_pin_memory": False,
    }


def lora(task_type: str) -> LoraConfig:
    """The adapters of every stage."""
    return LoraConfig(
        r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type=task_type,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    )


def pretrained(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Stands in for LLaMA: a model that knows good and bad answers alike."""
    texts = [text_of(row["question"], row[f"response_{at}"]) for row in ROWS for at in "jk"]
    trainer = SFTTrainer(
        model=fresh_causal_lm(
            family="llama",
            tokenizer=tokenizer,
            context=128,
            hidden_size=32,
            layers=2,
            heads=2,
            seed=0,
        ),
        args=TrainingArguments(**settings(folder / "base-run", 60)),
        train_dataset=Dataset.from_dict({"text": texts}),
        dataset_text_field="text",
        packing=True,
        max_seq_length=64,
        tokenizer=tokenizer,
    )
    trainer.train()
    return trainer.model


def supervised(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Fine-tune adapters on packed questions and answers, and merge them."""
    trainer = SFTTrainer(
        model=pretrained(folder, tokenizer),
        args=TrainingArguments(**settings(folder / "sft-run", 1)),
        train_dataset=Dataset.from_list(ROWS),
        formatting_func=lambda row: text_of(row["question"], row["response_j"]),
        packing=True,
        max_seq_length=64,
        tokenizer=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    return folder / "sft"


def reward(folder: Path, sft: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Train a reward model on pairs, and merge its adapters."""

    def encode(row: dict[str, str]) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for letter in "jk":
            found = tokenizer(text_of(row["question"], row[f"response_{letter}"]))
            columns[f"input_ids_{letter}"] = found["input_ids"]
            columns[f"attention_mask_{letter}"] = found["attention_mask"]
        return columns

    rows = Dataset.from_list(ROWS)
    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(max_length=128, **settings(folder / "reward-run", 15)),
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        tokenizer=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    trainer.train()
    merged = trainer.model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    return folder / "reward"


def policy(folder: Path, sft: Path, judge: Path) -> dict[str, Any]:
    """PPO of new adapters on the supervised model, whose base is the reference."""
    config = PPOConfig(
        model_name=str(sft),
        learning_rate=2e-3,
        batch_size=32,
        mini_batch_size=8,
        gradient_accumulation_steps=2,
        early_stopping=True,
        target_kl=0.1,
        init_kl_coef=0.05,
        seed=0,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(sft, peft_config=lora("CAUSAL_LM"))
    scorer = pipeline("sentiment-analysis", model=str(judge), device=-1)
    tokenizer = scorer.tokenizer
    tokenizer.padding_side = "right"  # of the scorer; generation pads on the left by itself
    texts = [f"Question: {row['question']}\n\nAnswer:" for row in ROWS]
    dataset = Dataset.from_dict(
        {"query": texts, "input_ids": [tokenizer(text)["input_ids"] for text in texts]}
    )
    dataset.set_format("torch")
    trainer = PPOTrainer(
        config,
        model,
        tokenizer=tokenizer,
        dataset=dataset,
        data_collator=lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    )
    lengths = LengthSampler(8, 16)
    stats: dict[str, Any] = {}
    for batch in itertools.chain.from_iterable(itertools.repeat(trainer.dataloader, EPOCHS)):
        queries = batch["input_ids"]
        responses = trainer.generate(
            queries,
            batch_size=16,
            return_prompt=False,
            length_sampler=lengths,
            do_sample=True,
            top_k=0.0,
            top_p=1.0,
        )
        batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
        judged = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
        outputs = scorer(judged, function_to_apply="none", batch_size=16)
        rewards = [torch.tensor(output["score"] - REWARD_BASELINE) for output in outputs]
        stats = trainer.step(queries, responses, rewards)
        trainer.log_stats(stats, batch, rewards)
        print(f"score {stats['ppo/mean_scores']:+.2f}  KL {stats['objective/kl']:+.2f}")
    trainer.save_pretrained(str(folder / "policy"))
    return stats


def main(folder: Path) -> dict[str, Any]:
    """All three stages.

    Args:
        folder: Gets sft/, reward/ and policy/.

    Returns:
        The statistics of the last PPO step.
    """
    set_seed(0)
    corpus = [text_of(row["question"], row["response_j"]) for row in ROWS[: len(TOPICS)]]
    tokenizer = train_tokenizer([*corpus, "Why would you?"], vocabulary=360)
    sft = supervised(folder, tokenizer)
    judge = reward(folder, sft, tokenizer)
    return policy(folder, sft, judge)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
