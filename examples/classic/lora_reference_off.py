#!/usr/bin/env python
"""PPO of adapters; the reference is the same model with its adapters switched off.

There is no second copy of the weights. With `load_in_8bit=True` and a real model this is how a
20-billion-parameter model fits on one card of 24 GB (needs `pip install suasion[quant]` and a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from suasion.models.load import fresh_causal_lm, train_tokenizer

TEXTS = ["Rain today, sun tomorrow.", "Sun today, rain tomorrow."]


def main() -> dict[str, Any]:
    """Two steps on adapters.

    Returns:
        What was trained, and KL before and after.
    """
    tokenizer = train_tokenizer(TEXTS, vocabulary=290)
    base = fresh_causal_lm(
        family="llama", tokenizer=tokenizer, context=64, hidden_size=32, layers=2, heads=2, seed=0
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        base,
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    )
    config = PPOConfig(batch_size=8, mini_batch_size=4, learning_rate=1e-2)
    trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)

    query = torch.tensor(tokenizer("Rain")["input_ids"])
    queries = [query] * 8
    kls = []
    for _ in range(2):
        responses, unchanged = trainer.generate(
            queries,
            batch_size=8,
            return_prompt=False,
            generate_ref_response=True,
            do_sample=True,
            top_k=0,
            max_new_tokens=8,
        )
        rewards = [torch.tensor(float(len(set(response.tolist())))) for response in responses]
        kls.append(trainer.step(queries, responses, rewards)["objective/kl"])
        print("policy   ", repr(tokenizer.decode(responses[0])))
        print("reference", repr(tokenizer.decode(unchanged[0])))
    learning = [p for p in model.parameters() if p.requires_grad]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in learning),
        "kl_first": kls[0],
        "kl_second": kls[1],
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:12} {value}")
