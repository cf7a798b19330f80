"""One `step` against the same step written as plain loops over single tokens, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from .conftest import batch_of, tiny

BETA, LAM, CLIP, VF, RATE = 0.2, 0.95, 0.2, 0.1, 0.05


@dataclass
class Expected:
    """What the loops found."""

    weights: dict[str, Tensor]
    stats: dict[str, float] = field(default_factory=dict)


def positions(model: Any, query: Tensor, response: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """(logits over the vocabulary, value, token) for each response token, one sequence alone."""
    logits, _, values = model(input_ids=torch.cat([query, response])[None])
    start = len(query) - 1
    return [
        (logits[0, start + t], values[0, start + t], int(response[t])) for t in range(len(response))
    ]


def penalty_of(kind: str, logits: Tensor, ref_logits: Tensor, token: int) -> float:
    """One token's penalty."""
    logp, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    gap = float(logp[token] - ref[token])
    if kind == "full":
        return sum(math.exp(a) * (a - b) for a, b in zip(logp.tolist(), ref.tolist(), strict=True))
    return {"kl": gap, "abs": abs(gap), "mse": gap * gap / 2}[kind]


def plain_loops(
    model: Any, reference: Any, batch: tuple[Any, Any, Any], kind: str, masks: list[Any]
) -> Expected:
    """One epoch of one mini-batch with plain SGD."""
    rows: list[dict[str, Any]] = []
    for query, response, score, mask in zip(*batch, masks, strict=True):
        mine = positions(model, query, response)
        theirs = positions(reference, query, response)
        chosen = [t for t in range(len(response)) if mask[t]]
        tokens = []
        for t in chosen:
            (logits, value, token), (ref_logits, _, _) = mine[t], theirs[t]
            kl = penalty_of(kind, logits.detach(), ref_logits.detach(), token)
            reward = -BETA * kl + (float(score) if t == chosen[-1] else 0.0)
            tokens.append(
                {"logp": logits.log_softmax(-1)[token], "value": value, "kl": kl, "reward": reward}
            )
        carry, after = 0.0, 0.0
        for entry in reversed(tokens):
            delta = entry["reward"] + after - entry["value"].item()
            carry = delta + LAM * carry
            entry["advantage"], after = carry, entry["value"].item()
            entry["return"] = carry + entry["value"].item()
        rows.append({"tokens": tokens, "kl": sum(e["kl"] for e in tokens)})
    every = [entry for row in rows for entry in row["tokens"]]
    count = len(every)
    mean = sum(e["advantage"] for e in every) / count
    var = sum((e["advantage"] - mean) ** 2 for e in every) / (count - 1)
    policy, value = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for e in every:
        gain = (e["advantage"] - mean) / math.sqrt(var + 1e-8)
        ratio = (e["logp"] - e["logp"].detach()).exp()
        policy = policy + torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - CLIP, 1 + CLIP))
        value = value + 0.5 * (e["value"] - e["return"]) ** 2
    policy, value = policy / count, value / count
    (policy + VF * value).backward()
    named = dict(model.pretrained_model.named_parameters())
    named |= {f"v_head.{k}": v for k, v in model.v_head.named_parameters()}
    returns = [e["return"] for e in every]
    centre = sum(returns) / count
    spread = sum((r - centre) ** 2 for r in returns) / (count - 1)
    error = sum((e["value"].item() - e["return"]) ** 2 for e in every) / count
    return Expected(
        {k: p.detach() - RATE * p.grad for k, p in named.items() if p.grad is not None},
        {
            "objective/kl": sum(row["kl"] for row in rows) / len(rows),
            "objective/kl_coef": BETA,
            "ppo/mean_non_score_reward": sum(-BETA * e["kl"] for e in every) / count,
            "ppo/loss/policy": policy.item(),
            "ppo/loss/value": value.item(),
            "ppo/loss/total": (policy + VF * value).item(),
            "ppo/policy/approxkl": 0.0,
            "ppo/policy/clipfrac": 0.0,
            "ppo/returns/mean": centre,
            "ppo/returns/var": spread,
            "ppo/val/error": error,
            "ppo/val/vpred": sum(e["value"].item() for e in every) / count,
            "ppo/val/var_explained": 1 - error / spread,
        },
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_step_is_the_plain_loop(
    kind: str,
    masked: bool,  # noqa: FBT001
    tokenizer: PreTrainedTokenizerFast,
    with_head: Callable[..., AutoModelForCausalLMWithValueHead],
) -> None:
    """Losses, statistics and every updated weight, with and without holes in the responses."""
    model = with_head(v_head_init_strategy="normal", v_head_initializer_range=0.3)
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(tiny(tokenizer, seed=5))
    batch = batch_of(6)
    masks = [torch.ones(len(r), dtype=torch.long) for r in batch[1]]
    if masked:
        masks[0][1], masks[3][-1] = 0, 0
    exact, exact_reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    expected = plain_loops(exact.eval(), exact_reference.eval(), batch, kind, masks)
    trainer = PPOTrainer(
        PPOConfig(
            batch_size=6, mini_batch_size=2, gradient_accumulation_steps=3, ppo_epochs=1,
            kl_penalty=kind,  # type: ignore[arg-type]
        ),
        model,
        reference,
        tokenizer,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
    )  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stats = trainer.step(*batch, response_masks=masks if masked else None)
    for name, value in expected.stats.items():
        assert stats[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    after = model.state_dict()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(after[name].double(), weight, rtol=1e-5, atol=1e-6, msg=name)
    moved = [k for k in after if not torch.equal(after[k], before[k])]
    assert "v_head.summary.weight" in moved
    assert len(moved) > 20


def test_the_comparison_can_fail(
    tokenizer: PreTrainedTokenizerFast,
    with_head: Callable[..., AutoModelForCausalLMWithValueHead],
) -> None:
    """Negative control: another mixing of advantages is another step."""
    model = with_head()
    batch = batch_of(4)
    exact = copy.deepcopy(model).double().eval()
    masks = [torch.ones(len(r)) for r in batch[1]]
    expected = plain_loops(exact, copy.deepcopy(exact), batch, "kl", masks)
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, lam=0.5),
        model,
        tokenizer=tokenizer,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
    )
    stats = trainer.step(*batch)
    assert stats["ppo/returns/var"] != pytest.approx(expected.stats["ppo/returns/var"], rel=1e-3)
