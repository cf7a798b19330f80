"""Is what this device computes right? Compared with float64 on the processor, before any timing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from suasion.core.records import Rollout, TokenBatch, token_batch
from suasion.models.roles import Policy
from suasion.rollout.graphs import NO_GRAPHS, SHORT
from suasion.rollout.sampler import Sampling, sample

WORDS, PAD = 500, 499
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest ||found - exact|| / ||exact||, for log-probabilities and for gradients."""
Autocast = Callable[[], Any]


def autocast_of(precision: str, device: torch.device) -> Autocast:
    """Context of a forward pass."""
    if precision == "fp32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def tiny(family: str) -> Any:
    """A random model of this family; Llama with fewer keys than queries."""
    torch.manual_seed(1)
    if family == "gpt2":
        dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            vocab_size=WORDS, n_positions=128, n_embd=128, n_layer=3, n_head=4,
            initializer_range=0.1, **dropout,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, max_position_embeddings=128, hidden_size=128, intermediate_size=256,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.1,
        )
    ).eval()  # fmt: skip


def prompts_of(lengths: Sequence[int], *, seed: int) -> list[list[int]]:
    """Random prompts of these lengths, without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, PAD, (n,), generator=generator).tolist() for n in lengths]


def rolled_out(policy: Policy, autocast: Autocast, *, greedy: bool) -> Rollout:
    """Responses to prompts of unlike length, some long enough for steps to be recorded."""
    prompts = prompts_of((5, 17, 9, 30, 3, 12), seed=2)
    limits = [20, 7, 2 * SHORT, 15, 2 * SHORT, 1]
    generator = torch.Generator().manual_seed(3)
    uniforms = [torch.rand(n, generator=generator, dtype=torch.float64) for n in limits]
    with autocast():
        return sample(
            policy,
            prompts,
            limits,
            uniforms,
            stop_ids=[WORDS - 2],
            pad_id=PAD,
            sampling=Sampling(greedy=greedy),
        )


def exact(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens [N] and the gradient of their mean, float64."""
    twin = copy.deepcopy(model).cpu().double()
    twin.set_attn_implementation("eager")
    logits = twin(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    found = logits.log_softmax(-1)[batch.predicts]
    found = found.gather(-1, batch.targets[:, None])[:, 0]
    found.mean().backward()
    return found.detach(), flat_gradient(twin)


def flat_gradient(model: Any) -> Tensor:
    """All gradients as one vector, float64 on the processor."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([gradient.detach().double().cpu().flatten() for gradient in found])


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the size of what is expected; NaN stays NaN and fails every comparison."""
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def faults(device: torch.device) -> tuple[list[str], int]:
    """Compare everything.

    Returns:
        A line for each comparison, and how many failed.
    """
    lines, wrong = [], 0
    for family in ("gpt2", "llama"):
        for precision, tolerance in TOLERANCE.items():
            model = tiny(family).to(device)
            policy = Policy(model, 1.0)
            autocast = autocast_of(precision, device)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                rollout = rolled_out(policy, autocast, greedy=False)
            slow = [str(warning.message) for warning in said if NO_GRAPHS in str(warning.message)]
            slow += [] if policy.packs else ["sequences are padded"]
            wrong += len(slow)
            lines += [f"WRONG  {family} {precision} {reason}" for reason in slow]
            batch = token_batch(rollout.queries, rollout.responses, PAD)
            logprobs, gradient = exact(model, batch)
            model.zero_grad()
            with autocast():
                again = policy.logprobs(batch.to(device))[0]
            again.mean().backward()
            for what, error in (
                (
                    "log-probabilities of the rollout",
                    distance(torch.cat(rollout.logprobs), logprobs),
                ),
                ("log-probabilities of a new pass", distance(again, logprobs)),
                ("gradient", distance(flat_gradient(model), gradient)),
            ):
                good = error <= tolerance
                wrong += not good
                said = "right" if good else "WRONG"
                lines.append(f"{said}  {family} {precision} {what}: {error:.1e} of {tolerance:.0e}")
        good = same_greedy(tiny(family).to(device))
        wrong += not good
        lines.append(f"{'right' if good else 'WRONG'}  {family} greedy tokens equal generate's")
    return lines, wrong


def same_greedy(model: Any) -> bool:
    """Whether greedy responses in fp32 are those of the library, prompt by prompt."""
    rollout = rolled_out(Policy(model, 1.0), nullcontext, greedy=True)
    device = next(model.parameters()).device
    for prompt, response in zip(rollout.queries, rollout.responses, strict=True):
        ids = torch.tensor([prompt], device=device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(response),
            eos_token_id=WORDS - 2,
            pad_token_id=PAD,
        )
        if found[0, len(prompt) :].tolist() != response:
            return False
    return True
