"""The KL-regularised optimum, known in closed form and reached by the policy loop.

Two tokens at most, from a vocabulary so small that every response can be listed. The objective is
E[reward] - BETA KL(policy || reference); its maximum is BETA log Z with
Z = E_reference[exp(reward / BETA)] (Ziegler et al. 1909.08593 eq. 2, Rafailov et al. 2305.18290
eq. 4). Objective and maximum are sums over all responses, without sampling error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.evidence.stage import BARE, TEMPLATE, curve_of, stage_of, tiny_model, word_codec
from suasion.config.schema import CriticConfig, KlConfig, PpoConfig, ResponseConfig
from suasion.core.records import token_batch
from suasion.data.codec import Codec
from suasion.trainers.ppo import PpoLoop

BETA = 0.5
PROMPT = "go"
WORDS = (PROMPT, "x", "y")
WORTH = {
    "x": 0.4,
    "y": -0.3,
    "x x": 1.0,
    "x y": -1.0,
    "y x": 2.0,
    "y y": 0.5,
    "go x": 1.5,
    "x go": 0.2,
}
"""Score of each text; those that are not named score zero."""

CONFIG = PpoConfig(
    reward="benchmarks.evidence.optimum:reward",
    template=TEMPLATE,
    steps=150,
    batch_size=512,
    mini_batch_size=512,
    micro_batch_tokens=8192,
    epochs=4,
    learning_rate=3e-3,
    schedule="linear",
    kl=KlConfig(coef=BETA, adaptive=False),
    response=ResponseConfig(max_tokens=2),
    critic=CriticConfig(coef=1.0, clip=None),
    **BARE,
)


def reward(_queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Look each text up."""
    return [WORTH.get(text, 0.0) for text in responses]


def all_responses(codec: Codec) -> list[list[int]]:
    """Every response there can be: one that ends at once, and two tokens of any kind."""
    tokens = range(len(codec.tokenizer))
    end = codec.stop_ids[0]
    longer = [[first, second] for first in tokens if first != end for second in tokens]
    return [[end], *longer]


class Objective:
    """The exact objective of a loop's policy, against its reference."""

    def __init__(self, loop: PpoLoop) -> None:
        codec = loop.parts.codec
        self._responses = all_responses(codec)
        queries = [codec.prompt_ids(PROMPT)] * len(self._responses)
        self._batch = token_batch(queries, self._responses, codec.pad_id)
        texts = [codec.text_of(ids) for ids in self._responses]
        self._worth = torch.tensor(reward([], texts), dtype=torch.float64)
        assert loop.parts.reference is not None
        self._reference = self._per_response(loop.parts.reference.logprobs(self._batch))

    @property
    def best(self) -> float:
        """BETA log Z, reward units."""
        return BETA * float(torch.logsumexp(self._reference + self._worth / BETA, 0))

    @torch.no_grad()
    def __call__(self, loop: PpoLoop) -> dict[str, float]:
        """Objective, reward and KL (nats) in expectation."""
        logprobs = self._per_response(loop.parts.policy.logprobs(self._batch)[0])
        probs = logprobs.exp()
        score = float((probs * self._worth).sum())
        kl = float((probs * (logprobs - self._reference)).sum())
        return {"objective": score - BETA * kl, "reward": score, "kl": kl}

    def _per_response(self, flat: Tensor) -> Tensor:
        """Sum the tokens of each response, [N] -> [responses]."""
        parts = flat.double().split([len(ids) for ids in self._responses])
        return torch.stack([part.sum() for part in parts])


def learn(config: PpoConfig = CONFIG, *, seed: int) -> tuple[list[dict[str, float]], float]:
    """Train; rows as of `curve_of` with `objective`, and the maximum there is.

    Args:
        config: Of the policy stage.
        seed: Of the model and the stage.
    """
    codec = word_codec(WORDS)
    model = tiny_model(codec, context=8, width=32, layers=1, seed=seed)
    with stage_of(model, codec, [PROMPT], config, seed=seed) as loop:
        objective = Objective(loop)
        return curve_of(loop, objective), objective.best
