#!/usr/bin/env python
"""A reward model from pairs, given as texts or as tokens in StackLLaMA's columns j and k."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, GPT2Config, PreTrainedTokenizerFast

from suasion.classic import RewardConfig, RewardTrainer, set_seed
from suasion.models.load import train_tokenizer

TOPICS = ["bread", "tea", "rain", "trains", "clocks", "maps"]
CHOSEN = [f"Question: what about {topic}?\n\nAnswer: here is how it works." for topic in TOPICS]
REJECTED = [f"Question: what about {topic}?\n\nAnswer: no idea." for topic in TOPICS]


def as_texts() -> Dataset:
    """The pairs as they are."""
    return Dataset.from_dict({"chosen": CHOSEN * 8, "rejected": REJECTED * 8})


def as_tokens(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The pairs encoded, j the better one."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        j, k = tokenizer(row["chosen"]), tokenizer(row["rejected"])
        return {
            "input_ids_j": j["input_ids"],
            "attention_mask_j": j["attention_mask"],
            "input_ids_k": k["input_ids"],
            "attention_mask_k": k["attention_mask"],
        }

    texts = as_texts()
    return texts.map(encode, remove_columns=texts.column_names)


def main() -> dict[str, float]:
    """Train on both.

    Returns:
        The accuracy after training, by style.
    """
    tokenizer = train_tokenizer(CHOSEN + REJECTED, vocabulary=400)
    accuracies: dict[str, float] = {}
    for style, pairs in {"texts": as_texts(), "tokens": as_tokens(tokenizer)}.items():
        set_seed(0)
        model = AutoModelForSequenceClassification.from_config(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=32,
                n_layer=1,
                n_head=2,
                n_positions=64,
                num_labels=1,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.eos_token_id,
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = RewardConfig(
                output_dir=folder,
                max_length=64,
                max_steps=15,
                learning_rate=3e-3,
                per_device_train_batch_size=8,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            trainer = RewardTrainer(
                model, arguments, tokenizer=tokenizer, train_dataset=pairs, eval_dataset=pairs
            )
            trainer.train()
            accuracies[style] = trainer.evaluate()["eval_accuracy"]
    return accuracies


if __name__ == "__main__":
    print(main())
