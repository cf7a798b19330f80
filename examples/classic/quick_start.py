#!/usr/bin/env python
"""Classic PPO in one step: one query, one response, a reward of 1.0.

The model is small and random, so that this runs anywhere in a second; put the name of a real one
into `AutoModelForCausalLMWithValueHead.from_pretrained` instead.
"""

from __future__ import annotations

from typing import Any

import torch

from suasion.classic import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from suasion.models.load import fresh_causal_lm, train_tokenizer

TEXTS = ["This morning I went to the park.", "This evening I went to the sea and swam."]


def main() -> dict[str, Any]:
    """Answer, judge, optimise.

    Returns:
        The statistics of the step.
    """
    tokenizer = train_tokenizer(TEXTS, vocabulary=300)
    base = fresh_causal_lm(
        family="gpt2", tokenizer=tokenizer, context=64, hidden_size=32, layers=2, heads=2, seed=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    reference = create_reference_model(model)

    config = PPOConfig(batch_size=1, mini_batch_size=1)
    trainer = PPOTrainer(config, model, reference, tokenizer)

    query = tokenizer("This morning I went to the ", return_tensors="pt")["input_ids"][0]
    response = trainer.generate(
        [query],
        return_prompt=False,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=16,
    )[0]
    print(repr(tokenizer.decode(response)))

    reward = [torch.tensor(1.0)]
    return trainer.step([query], [response], reward)


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:32} {value}")
