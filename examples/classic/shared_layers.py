#!/usr/bin/env python
"""A reference that shares the first layers with the policy, which are frozen in both."""

from __future__ import annotations

import torch

from suasion.classic import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from suasion.models.load import fresh_causal_lm, train_tokenizer


def main() -> dict[str, int]:
    """Share four layers of six.

    Returns:
        Parameters of the policy, of the reference alone, and those that learn.
    """
    tokenizer = train_tokenizer(["left right", "right left"], vocabulary=270)
    base = fresh_causal_lm(
        family="gpt2", tokenizer=tokenizer, context=32, hidden_size=32, layers=6, heads=2, seed=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    reference = create_reference_model(model, num_shared_layers=4)
    trainer = PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=1), model, reference, tokenizer=tokenizer
    )
    query = torch.tensor(tokenizer("left")["input_ids"])
    responses = trainer.generate(
        [query, query], return_prompt=False, do_sample=True, top_k=0, max_new_tokens=4
    )
    trainer.step([query, query], responses, [torch.tensor(1.0), torch.tensor(0.0)])

    policy = {p.data_ptr() for p in model.parameters()}
    return {
        "policy": sum(p.numel() for p in model.parameters()),
        "reference_only": sum(
            p.numel() for p in reference.parameters() if p.data_ptr() not in policy
        ),
        "learning": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:16} {value}")
