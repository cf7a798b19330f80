"""Recorded decoding steps: a stand-in records, so that what a graph needs is shown on any device.

The stand-in runs the recorded function again, on the memory it was recorded with, and writes its
result where the first one was: as a CUDA graph does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from suasion.models.roles import Policy
from suasion.rollout import decoders
from suasion.rollout.graphs import SHORT, Replayed, recorder, rows_in_steps
from suasion.rollout.sampler import sample
from tests.unit.conftest import tiny_model

LIMITS = [40, 3, 50, 20, 1, 60]
QUERIES = [[5, 9, 11], [7], [8, 8, 6, 5, 12, 13, 9], [4, 6], [7], [30, 31, 32]]


class StandIn:
    """Records and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run it twice: a step is set up before it is recorded."""
        self.recorded += 1
        function()
        out = function().clone()

        def again() -> None:
            self.replayed += 1
            out.copy_(function())

        return again, out


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("slots", [256, 4])
def test_replayed_steps_give_the_same(
    monkeypatch: pytest.MonkeyPatch, family: str, slots: int
) -> None:
    """Tokens and log-probabilities, while rows end and waiting prompts take their places."""
    policy = Policy(tiny_model(family).eval(), 1.0)
    numbers = [
        torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        for row in range(len(QUERIES))
    ]
    record = StandIn()
    found = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(decoders, "recorder", lambda _: record)
        found.append(sample(policy, QUERIES, LIMITS, numbers, stop_ids=(3,), pad_id=0, slots=slots))
    plain, replayed = found
    assert plain.responses == replayed.responses
    for one, two in zip(plain.logprobs, replayed.logprobs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert record.replayed > 50
    assert record.recorded <= 6  # 1, 2, 4 (3) or 6 rows, 64 or 128 keys


def test_memory_is_free_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and recordings of a rollout are gone when it is, without a search for cycles."""
    monkeypatch.setattr(decoders, "recorder", lambda _: StandIn())
    policy = Policy(tiny_model("gpt2").eval(), 1.0)
    gc.disable()
    try:
        with torch.no_grad():
            decoder = decoders.SlotDecoder(policy, QUERIES, LIMITS, 4)
            rows, _ = decoder.start()
            decoder.advance(rows + 5, torch.ones(len(rows), dtype=torch.bool))
        cache = weakref.ref(decoder._cache)  # noqa: SLF001
        assert cache() is not None
        del decoder
        assert cache() is None
    finally:
        gc.enable()


def test_short_responses_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording takes as long as two steps."""
    policy, record = Policy(tiny_model("gpt2").eval(), 1.0), StandIn()
    monkeypatch.setattr(decoders, "recorder", lambda _: record)
    numbers = [torch.rand(SHORT, dtype=torch.float64)]
    sample(policy, [[5, 6]], [SHORT], numbers, stop_ids=(), pad_id=0)
    assert record.recorded == 0


def test_what_cannot_be_recorded_is_run() -> None:
    """Said once; sizes recorded before are still repeated."""
    record = StandIn()

    def failing(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if record.recorded:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return record(function)

    def step(token: Tensor, at: Tensor, keys: int) -> Tensor:
        return (token + at + keys)[:, None]

    run, one = Replayed(step, failing), torch.ones(2, dtype=torch.long)
    assert run(one, one, 64).tolist() == [[66], [66]]
    with pytest.warns(UserWarning, match="decoding without CUDA graphs: operation not permitted"):
        assert run(one, one, 128).tolist() == [[130], [130]]
    assert run(2 * one, one, 128).tolist() == [[131], [131]]
    assert run(2 * one, one, 64).tolist() == [[67], [67]]
    assert record.recorded == 1
    assert record.replayed == 2


def test_rows_come_in_few_sizes() -> None:
    """Halves of the batch, rounded up: never fewer than there are, never more than slots."""
    assert [rows_in_steps(rows, 6) for rows in range(1, 7)] == [1, 2, 3, 6, 6, 6]
    assert rows_in_steps(1, 1) == 1
    for most in (1, 7, 48, 100):
        sizes = [rows_in_steps(rows, most) for rows in range(1, most + 1)]
        assert all(rows <= size <= most for rows, size in enumerate(sizes, start=1))
        assert len(set(sizes)) <= most.bit_length() + 1


def test_processors_run_steps_as_they_are() -> None:
    """Launching is a call there."""
    assert recorder(torch.device("cpu")) is None
