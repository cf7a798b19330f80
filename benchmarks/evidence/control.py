"""The adaptive coefficient in a closed loop: does the KL settle where it was told to?

A fresh model writes words; the reward is the share of the places that hold a word of the first
half, which costs KL to raise. The coefficient is the only thing that keeps the policy from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.evidence.stage import BARE, TEMPLATE, curve_of, stage_of, tiny_model, word_codec
from suasion.config.schema import CriticConfig, KlConfig, PpoConfig, ResponseConfig

HALF = 8
PLACES = 8
"""Tokens of the longest response."""
WORDS = (*(f"good{n}" for n in range(HALF)), *(f"bad{n}" for n in range(HALF)))
LAST = 30
"""Iterations whose mean is the settled value."""

CONFIG = PpoConfig(
    reward="benchmarks.evidence.control:reward",
    template=TEMPLATE,
    steps=120,
    batch_size=64,
    mini_batch_size=32,
    epochs=2,
    learning_rate=5e-4,
    kl=KlConfig(coef=0.1, target=2.0, horizon=400.0),
    response=ResponseConfig(max_tokens=PLACES),
    critic=CriticConfig(coef=1.0),
    **BARE,
)


def reward(_queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the places with a word of the first half."""
    return [sum(word.startswith("good") for word in r.split()) / PLACES for r in responses]


def learn(config: PpoConfig = CONFIG, *, seed: int) -> list[dict[str, float]]:
    """Train a fresh model; rows as of `curve_of`.

    Args:
        config: Of the policy stage.
        seed: Of the model and the stage.
    """
    codec = word_codec(WORDS)
    model = tiny_model(codec, context=16, width=32, layers=1, seed=seed)
    with stage_of(model, codec, WORDS, config, seed=seed) as loop:
        return curve_of(loop, lambda _: {})[1:]


def settled(rows: Sequence[dict[str, float]], name: str = "objective/kl") -> float:
    """Mean over the last `LAST` iterations."""
    return statistics.fmean(row[name] for row in rows[-LAST:])
