"""Models that only look: judges, references, models that answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from suasion.config.schema import ResponseConfig
from suasion.models.roles import AdapterStates, Policy
from suasion.plan.ledger import KV_CACHE
from suasion.plan.rehearse import Rehearsal
from suasion.rollout.decoders import Decoder, PaddedDecoder, SlotDecoder
from suasion.rollout.rewards import RewardModel
from suasion.rollout.sampler import Sampling, draw, sample


def _default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


SCORED_TOKENS: int = _default(RewardModel, "batch_tokens")
"""Tokens of one forward pass of a reward model."""
SLOTS: int = _default(sample, "slots")
"""Responses that are decoded at the same time."""


def judge_of(stage: Rehearsal, model: Any, states: AdapterStates | None = None) -> RewardModel:
    """A reward model that scores tokens; it has no tokenizer to score texts with."""
    codec: Any = SimpleNamespace(pad_id=0)
    with stage.trying(model):
        return RewardModel(model, codec, states=states)


def answer_phases(
    stage: Rehearsal,
    policy: Policy,
    count: int,
    prompt: int,
    response: ResponseConfig,
    *,
    autocast: Callable[[], Any],
    roles: tuple[str, ...] = (),
) -> None:
    """Note what sampling holds: with all prompts read, and at the last token of all responses.

    Args:
        stage: Keeps the books.
        policy: Answers.
        count: Prompts.
        prompt: Tokens of each.
        response: How responses are sampled.
        autocast: Context of each forward pass.
        roles: Whose weights are on the device.
    """
    sampling = Sampling(top_k=response.top_k, top_p=response.top_p)
    policy.model.eval()

    def read(length: int, left: int) -> tuple[Decoder, Tensor]:
        # No two prompts are equal, or they would be read once.
        queries = [[number, *[0] * (length - 1)] for number in range(count)]
        decoder: Decoder = (
            SlotDecoder(policy, queries, [left] * count, SLOTS)
            if policy.packs
            else PaddedDecoder(policy, queries, 0)
        )
        before = stage.ledger.count
        with autocast():
            hidden = decoder.start()[1]
        stage.ledger.label_rest(KV_CACHE, before)
        return decoder, hidden

    def next_token(hidden: Tensor) -> Tensor:
        with autocast():
            probs = policy.logits(hidden).softmax(-1)
        return draw(probs, torch.rand(len(hidden), dtype=torch.float64), sampling)

    with torch.no_grad():
        stage.phase("prompts", lambda: read(prompt, response.max_tokens), roles)
        with stage.inside():
            decoder, hidden = read(prompt + response.max_tokens - 1, 1)

        def last_token() -> None:
            token = next_token(hidden)
            with autocast():
                decoder.advance(token, torch.ones(len(hidden), dtype=torch.bool))

        stage.phase("rollout", last_token, roles)
