#!/usr/bin/env python
"""What each process of `test_ranks` does: three steps, then its weights into a file."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from suasion.classic.ppo_batch import checked_batch
from suasion.classic.ppo_roles import HeadCritic, scored_rollout
from suasion.classic.ppo_setup import NoSchedule
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.models.load import switch_off_dropout, train_tokenizer
from suasion.models.roles import Policy
from suasion.rollout.experience import Experience, build_experience
from suasion.trainers.policy import PolicyTrainer, UpdateSettings


def batch(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Four responses of several lengths."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = [(2, 3), (1, 5), (3, 2), (2, 1 + seed)]
    queries = [torch.randint(2, 250, (q,), generator=drawn) for q, _ in sizes]
    responses = [torch.randint(2, 250, (r,), generator=drawn) for _, r in sizes]
    return queries, responses, [torch.randn((), generator=drawn) for _ in sizes]


def share_of(experience: Experience, rows: list[int]) -> Experience:
    """The experience of some of the responses."""

    def part(value: Any) -> Any:
        if isinstance(value, float):
            return value
        return value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]

    return Experience(*(part(getattr(experience, field.name)) for field in fields(Experience)))


def divided_step(model: AutoModelForCausalLMWithValueHead, accelerator: Accelerator) -> None:
    """One step on four responses, of which each process has its share."""
    switch_off_dropout(model)
    policy, critic = Policy(model.pretrained_model, 1.0), HeadCritic(model.v_head)
    given = checked_batch(*batch(0), None, 4)
    rollout = scored_rollout(given, policy, critic, stop_ids=[0], pad_id=1, batch_tokens=64)
    experience = build_experience(
        rollout,
        given.scores,
        policy=policy,
        reference=None,
        critic=critic,
        estimate=partial(gae, gamma=1.0, lam=0.95),
        kl_coef=0.1,
        whiten_advantages=True,
        pad_id=1,
        batch_tokens=64,
    )
    ranks = accelerator.num_processes
    PolicyTrainer(
        policy,
        critic,
        torch.optim.SGD(model.parameters(), lr=0.1),
        NoSchedule(),
        clipped_surrogate,
        clipped_value_loss,
        UpdateSettings(
            epochs=1,
            mini_batch_size=4 // ranks,
            micro_batch_tokens=8,
            max_grad_norm=0.5,
            value_coef=0.1,
        ),
        pad_id=1,
        autocast=nullcontext,
        sum_over_ranks=partial(accelerator.reduce, reduction="sum"),
    ).optimise(
        share_of(experience, list(range(accelerator.process_index, 4, ranks))), torch.Generator()
    )


def main(prefix: str) -> None:
    """Train on a divided batch, on a common one, and on one of this process's own."""
    tokenizer = train_tokenizer(["a few words"], 280)
    settings = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, vocab_size=280, **settings)
    )
    model = AutoModelForCausalLMWithValueHead(plain)
    divided = copy.deepcopy(model)
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, optimizer=optimizer)
    rank = trainer.accelerator.process_index
    divided_step(divided, trainer.accelerator)
    trainer.step(*batch(0))
    weights = {f"divided.{k}": v.clone() for k, v in divided.state_dict().items()}
    weights |= {f"same.{k}": v.clone() for k, v in model.state_dict().items()}
    stats = trainer.step(*batch(rank + 1))
    weights |= {f"other.{k}": v.clone() for k, v in model.state_dict().items()}
    weights["kl_coef"] = torch.tensor(trainer.kl_ctl.value / (4 * config.world_size))
    weights["loss"] = torch.tensor(stats["ppo/loss/total"])
    torch.save(weights, f"{prefix}-{rank}.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
