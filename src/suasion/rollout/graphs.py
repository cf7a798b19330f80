"""Decoding steps on a GPU as CUDA graphs: all kernels of a step are launched at once.

A small model's kernels take less time than launching them one by one from Python. A graph repeats
what was recorded, on the same memory, so a step is recorded for each number of rows and keys that
occurs; both come in few sizes.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import Tensor

KEYS = 64
"""Recorded steps look at a multiple of this many keys, most of them masked at first."""
SHORT = 32
"""Responses up to so many tokens are not worth recording."""

NO_GRAPHS = "decoding without CUDA graphs"
"""Begins the warning where a step cannot be recorded."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Token [n] and its place in each sequence [n], and keys to look at -> hidden states [n, D]."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function does; gives what does it again, and where its result then is."""


def rows_in_steps(rows: int, most: int) -> int:
    """The least of `most`, its half, its quarter ... (rounded up) that `rows` fit into."""
    while (half := -(-most // 2)) >= rows and half < most:
        most = half
    return most


class Replayed:
    """A step that is recorded when a size first occurs, and repeated from then on.

    The step must do the same when it is done twice, as storing a key at its place does. One that
    cannot be recorded (it waits for the device) is run as it is.

    Args:
        step: What to record; it may only depend on its arguments and on memory that stays in place.
        record: How.
    """

    def __init__(self, step: Step, record: Record) -> None:
        self._step = step
        self._record: Record | None = record
        self._held: dict[tuple[int, int], _Recorded] = {}

    def __call__(self, token: Tensor, at: Tensor, keys: int) -> Tensor:
        """The step's result; the next call may overwrite it."""
        size = (len(token), keys)
        if size not in self._held and self._record is not None:
            try:
                self._held[size] = _Recorded(self._step, token, at, keys, self._record)
            except RuntimeError as error:
                self._record = None
                reason = str(error).partition("\n")[0]
                warnings.warn(f"{NO_GRAPHS}: {reason}", stacklevel=2)
        recorded = self._held.get(size)
        return self._step(token, at, keys) if recorded is None else recorded(token, at)


class _Recorded:
    """A step on tokens and places that are copied in."""

    def __init__(self, step: Step, token: Tensor, at: Tensor, keys: int, record: Record) -> None:
        token, at = token.clone(), at.clone()
        self._token, self._at = token, at
        self._again, self._out = record(lambda: step(token, at, keys))

    def __call__(self, token: Tensor, at: Tensor) -> Tensor:
        self._token.copy_(token)
        self._at.copy_(at)
        self._again()
        return self._out


def recorder(device: torch.device) -> Record | None:
    """How steps are recorded on a device; None where launching costs nothing."""
    return _record if device.type == "cuda" else None


def _record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Make a graph. All share their memory: no result is read after another one has run."""
    stream, pool = _apart(torch.cuda.current_device())
    here = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(here)
    try:
        with _no_collection(), _conversions_not_kept(), torch.cuda.stream(stream):
            # Libraries set themselves up in a first run, which cannot be recorded. Nor can a step
            # that waits for the device; found out while recording, that would do lasting harm.
            with _no_waiting():
                function()
            # Not `torch.cuda.graph`, which first gives back all memory kept for the update (and in
            # older versions of torch collects garbage).
            graph.capture_begin(pool=pool.id)  # type: ignore[arg-type]  # as its own handles are
            try:
                out = function()
            finally:
                graph.capture_end()
    finally:
        here.wait_stream(stream)
    return graph.replay, out


@cache
def _apart(device: int) -> tuple[torch.cuda.Stream, torch.cuda.MemPool]:
    """Where to record on a device, and in which memory: for good, as libraries keep some for each.

    A pool of its own would leave that memory reserved after every rollout.
    """
    return torch.cuda.Stream(device), torch.cuda.MemPool()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise an error where something waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What a collection frees may call the device, which would spoil the recording."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _conversions_not_kept() -> AbstractContextManager[object]:
    """Autocast without its memory of converted weights: a replay must not read what was freed."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
