#!/usr/bin/env python
"""Any torch optimizer and any learning-rate schedule.

8-bit Adam and Lion come from bitsandbytes, `pip install suasion[quant]`; they are left out here
where it is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from suasion.models.load import fresh_causal_lm, train_tokenizer

Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def optimizers() -> dict[str, Make]:
    """What is tried, by name."""
    found: dict[str, Make] = {
        "Adam": partial(torch.optim.Adam, lr=1e-3),
        "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    }
    if importlib.util.find_spec("bitsandbytes") and torch.cuda.is_available():
        import bitsandbytes

        found["Adam8bit"] = partial(bitsandbytes.optim.Adam8bit, lr=1e-3)
        found["Lion"] = partial(bitsandbytes.optim.Lion, lr=1e-4)
    else:
        print("Adam8bit and Lion: pip install suasion[quant], on a machine with a GPU")
    return found


def main() -> dict[str, list[float]]:
    """Three steps with each optimizer under an exponential schedule.

    Returns:
        The learning rates each used.
    """
    tokenizer = train_tokenizer(["one two three", "three two one"], vocabulary=270)
    rates: dict[str, list[float]] = {}
    for name, make in optimizers().items():
        base = fresh_causal_lm(
            family="gpt2",
            tokenizer=tokenizer,
            context=32,
            hidden_size=32,
            layers=1,
            heads=2,
            seed=0,
        )
        model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
        optimizer = make(model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        trainer = PPOTrainer(
            PPOConfig(batch_size=4, mini_batch_size=2),
            model,
            tokenizer=tokenizer,
            optimizer=optimizer,
            lr_scheduler=schedule,
        )
        rates[name] = [_step(trainer)["ppo/learning_rate"] for _ in range(3)]
    return rates


def _step(trainer: PPOTrainer) -> dict[str, Any]:
    query = torch.tensor(trainer.tokenizer("one")["input_ids"])
    responses = trainer.generate(
        [query] * 4, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=6
    )
    rewards = [torch.tensor(float(len(response))) for response in responses]
    return trainer.step([query] * 4, responses, rewards)


if __name__ == "__main__":
    for name, values in main().items():
        print(name, values)
