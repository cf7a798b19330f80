"""Letting a model answer a list of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suasion.config.schema import ResponseConfig
from suasion.core.progress import Meter
from suasion.core.records import Rollout
from suasion.data.codec import Codec
from suasion.models.roles import Policy
from suasion.rollout.sampler import Sampling, sample
from suasion.trainers.ppo import uniform_rows

BATCH = 64
"""Prompts answered at a time."""


@dataclass(frozen=True)
class Answers:
    """Responses to prompts, in their order."""

    texts: list[str]
    """As people read them."""
    rollouts: list[Rollout]
    """As they were sampled, batch by batch."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(ids) for part in self.rollouts for ids in part.responses]


def answer(
    policy: Policy,
    codec: Codec,
    queries: Sequence[str],
    response: ResponseConfig,
    *,
    seed: int,
    meter: Meter | None = None,
    greedy: bool = False,
) -> Answers:
    """Sample one response per prompt.

    The random numbers depend on the seed and the prompt's place only, so two models compared with
    one seed see the same ones.
    """
    policy.model.eval()
    rollouts, texts = [], []
    for start in range(0, len(queries), BATCH):
        part = queries[start : start + BATCH]
        limits = [response.max_tokens] * len(part)
        rollout = sample(
            policy,
            [codec.prompt_ids(query) for query in part],
            limits,
            uniform_rows(seed, ("answer", start), limits),
            stop_ids=codec.stop_ids,
            pad_id=codec.pad_id,
            sampling=Sampling.of(response, greedy=greedy),
            slots=response.at_once,
            text_of=codec.text_of,
        )
        rollouts.append(rollout)
        texts += [codec.text_of(ids) for ids in rollout.responses]
        if meter:
            meter.advance(len(part))
    return Answers(texts, rollouts)
