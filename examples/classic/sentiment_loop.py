#!/usr/bin/env python
"""A language model learns to please a sentiment classifier.

The classic loop in full: queries from a dataset, response lengths from a sampler, rewards from a
text-classification pipeline, statistics to TensorBoard. Model and classifier are small and made
here; with `lvwerra/gpt2-imdb` and `lvwerra/distilbert-imdb` in their place it is the well-known
experiment.

The classifier's label is looked up by its name. Its place is no help: pipelines sort their output
by confidence, so that the first label is another one from text to text.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    pipeline,
)

from suasion.classic import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    set_seed,
)
from suasion.models.load import fresh_causal_lm, train_tokenizer

GOOD = ["a fine film", "a warm and funny story", "great fun", "a lovely cast"]
BAD = ["a dull film", "a cold and slow story", "no fun", "a weak cast"]
QUERIES = ["This film is", "The story was", "I found the cast", "All in all it is"]


def classifier(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Train a small sentiment classifier for a moment."""
    model = AutoModelForSequenceClassification.from_config(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=1,
            n_head=2,
            n_positions=64,
            num_labels=2,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )
    tokenizer.padding_side = "right"  # GPT-2 counts its positions from the left
    batch = tokenizer(GOOD + BAD, padding=True, return_tensors="pt")
    labels = torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device=-1)


def positive_logits(pipe: Any, texts: list[str]) -> list[torch.Tensor]:
    """The logit of POSITIVE for each text."""
    outputs = pipe(texts, top_k=None, function_to_apply="none", batch_size=16)
    return [
        next(torch.tensor(entry["score"]) for entry in output if entry["label"] == "POSITIVE")
        for output in outputs
    ]


def main(steps: int, logging_dir: str) -> list[float]:
    """Run the loop.

    Args:
        steps: Batches to learn from.
        logging_dir: Where TensorBoard finds the run.

    Returns:
        The mean reward of each step.
    """
    set_seed(0)
    tokenizer = train_tokenizer(GOOD + BAD + QUERIES, vocabulary=330)
    base = fresh_causal_lm(
        family="gpt2", tokenizer=tokenizer, context=64, hidden_size=32, layers=2, heads=2, seed=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)

    dataset = Dataset.from_dict({"query": QUERIES * 16}).map(
        lambda row: {"input_ids": tokenizer(row["query"])["input_ids"]}
    )
    dataset.set_format("torch")

    def collate(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    config = PPOConfig(
        learning_rate=5e-3,
        batch_size=32,
        mini_batch_size=16,
        init_kl_coef=0.02,
        log_with="tensorboard",
        project_kwargs={"logging_dir": logging_dir},
    )
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, dataset=dataset, data_collator=collate)
    judge = classifier(tokenizer)
    lengths = LengthSampler(4, 9)
    settings = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}

    means: list[float] = []
    while len(means) < steps:
        for batch in trainer.dataloader:
            queries = batch["input_ids"]
            responses = trainer.generate(
                queries, length_sampler=lengths, batch_size=32, return_prompt=False, **settings
            )
            batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
            texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
            rewards = positive_logits(judge, texts)
            stats = trainer.step(queries, responses, rewards)
            trainer.log_stats(stats, batch, rewards)
            means.append(float(torch.stack(rewards).mean()))
            if len(means) == steps:
                break
    trainer.accelerator.end_training()
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Classic PPO against a sentiment classifier.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--logging-dir", default=tempfile.mkdtemp(prefix="sentiment-"))
    options = parser.parse_args()
    for step, mean in enumerate(main(options.steps, options.logging_dir), start=1):
        print(f"step {step:3}  mean reward {mean:+.3f}")
    print(f"tensorboard --logdir {options.logging_dir}")
