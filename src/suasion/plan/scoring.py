"""Models that only look: judges, references, models that answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from suasion.config.schema import ResponseConfig
from suasion.models.load import score_head
from suasion.models.roles import HiddenStates, Policy
from suasion.plan.ledger import KV_CACHE
from suasion.plan.rehearse import Rehearsal
from suasion.rollout.decoders import Decoder, PaddedDecoder, SlotDecoder
from suasion.rollout.rewards import RewardModel
from suasion.rollout.sampler import Sampling, draw


def _default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


SCORED_TOKENS: int = _default(RewardModel, "batch_tokens")
"""Tokens of one forward pass of a reward model."""
ROWS = 8
"""Rows that a rehearsal runs side by side."""


def folded(states: HiddenStates, rows: int, *lengths: int) -> tuple[int, ...]:
    """Fewer and longer rows of as many tokens, where they run side by side without padding.

    Nothing then grows faster than the tokens, and a rehearsal takes as long as it has rows.

    Args:
        states: The model that reads them.
        rows: How many there are.
        lengths: Tokens of the parts of each.

    Returns:
        Rows, and the lengths of their parts.
    """
    times = rows // ROWS
    if not states.packs or times < 2:
        return rows, *lengths
    return -(-rows // times), *(times * length for length in lengths)


@dataclass(frozen=True)
class Judge:
    """A reward model that scores tokens; it has no tokenizer to score texts with."""

    states: HiddenStates
    """What reads the texts."""
    model: RewardModel
    """What scores them."""

    def score(self, rows: int, *lengths: int) -> None:
        """Score texts of a prompt and a response."""
        count, prompt, response = folded(self.states, rows, *lengths)
        self.model.score_tokens([([0] * prompt, [0] * response)] * count)


def judge_of(stage: Rehearsal, model: Any, states: HiddenStates | None = None) -> Judge:
    """The reward model in `model`, or, where it shares a base, the one seen through `states`."""
    codec: Any = SimpleNamespace(pad_id=0)
    with stage.trying(model):
        found = states or HiddenStates(model, score_head(model))
        return Judge(found, RewardModel(model, codec, states=found))


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
    sampling = Sampling.of(response)
    policy.model.eval()

    def read(rows: int, length: int, left: int, *, alike: bool) -> tuple[Decoder, Tensor]:
        # Equal prompts are read once: right where only the cache they leave is of interest.
        queries = [[0 if alike else number, *[0] * (length - 1)] for number in range(rows)]
        decoder: Decoder = (
            SlotDecoder(policy, queries, [left] * rows, response.at_once)
            if policy.packs
            else PaddedDecoder(policy, queries, 0)
        )
        before = stage.ledger.count
        with autocast():
            hidden = decoder.start()[1]
        stage.ledger.label_rest(KV_CACHE, before)
        return decoder, hidden

    def next_token(decoder: Decoder, hidden: Tensor) -> None:
        with autocast():
            whole = hidden.new_empty(count, hidden.shape[-1])  # `hidden` may be folded
            probs = policy.logits(whole).softmax(-1)
            draw(probs, torch.rand(count, dtype=torch.float64), sampling)
            del probs
            rows = len(hidden)
            decoder.advance(torch.zeros(rows, dtype=torch.long), torch.ones(rows) > 0)

    with torch.no_grad():
        rows, length, left = folded(policy, count, prompt, response.max_tokens)
        stage.phase("prompts", lambda: read(rows, length, left, alike=False), roles)
        with stage.inside():
            decoder, hidden = read(rows, length + left - 1, 1, alike=True)
        stage.phase("rollout", lambda: next_token(decoder, hidden), roles)
