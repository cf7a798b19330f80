"""How long it would take: operations over operations per second."""

from __future__ import annotations

import time

import torch

from suasion.plan.cards import Card
from suasion.plan.records import StagePlan

SECONDS = 0.3
"""How long to measure, at least."""
BANDWIDTH = {True: 8e11, False: 1e10}
"""Bytes per second read from memory while decoding: a GPU of 24 GB and up, or not."""


def throughput(card: Card, given: float | None) -> tuple[float, str]:
    """Operations per second to reckon with, and where the figure comes from.

    Args:
        card: Where it would run.
        given: What the user says; wins.
    """
    if given is not None:
        return given, "given with --flops"
    if card.flops is not None:
        return card.flops, f"a third of the peak of {card.name}"
    return measured_throughput(), "measured here, by products of matrices"


def measured_throughput(size: int = 1024) -> float:
    """Operations per second of products of [size, size] matrices on this machine's device."""
    gpu = torch.cuda.is_available()
    kind = {"device": "cuda", "dtype": torch.bfloat16} if gpu else {}
    a, b = (torch.randn(size, size).to(**kind) for _ in range(2))  # type: ignore[call-overload]
    a @ b
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        a @ b
        count += 1
        if gpu:
            torch.cuda.synchronize()
    return 2.0 * size**3 * count / (time.perf_counter() - began)


def seconds_of(stage: StagePlan, card: Card, flops: float) -> float | None:
    """Seconds of a stage, or of one of its steps where only the data knows how many there are.

    Decoding reads all weights for every token of the longest response, whatever the batch.
    """
    work = stage.work
    if work is None:
        return None
    each = work.operations / flops + work.streamed / BANDWIDTH[card.gpu]
    return each * (work.steps or 1)
