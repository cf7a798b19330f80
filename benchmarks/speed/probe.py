"""Clock, memory and load of a measured process. Standard library only: peers import it too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
QUIET = 0.25
"""Cores that other processes may use while a reading counts as undisturbed."""


def busy_seconds() -> float:
    """Processor seconds that all processes of this machine have used, stolen time included."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICK


def forget_peak() -> None:
    """Let the peak of the resident memory start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident memory since the start, or since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


class Probe:
    """Measures iterations phase by phase and prints one JSON line for each.

    `iteration` numbers them from 0; `note` is what the system has to say about itself.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.iteration = 0
        self.note = ""
        self._phases: dict[str, float] = {}
        self._positions = self._tokens = 0
        self._began: float | None = None

    @property
    def running(self) -> bool:
        """Whether an iteration has begun and not ended."""
        return self._began is not None

    def start(self) -> None:
        """Begin an iteration."""
        forget_peak()
        self._phases, self._positions, self._tokens = {}, 0, 0
        self._busy, self._own = busy_seconds(), time.process_time()
        self._began = self._last = self._clock()

    def mark(self, phase: str) -> None:
        """End a phase, which began where the one before it ended."""
        now = self._clock()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def split(self, rest: dict[str, float]) -> None:
        """End a span whose phases the system measured itself.

        Args:
            rest: Seconds by phase; what they leave of the span goes to no phase.
        """
        for phase, seconds in rest.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        self._last = self._clock()

    def watch(self, embedding: Any) -> None:
        """Count what goes through a model's input embedding; its last row is the padding."""
        padding = embedding.num_embeddings - 1
        embedding.register_forward_hook(lambda _, inputs, __: self.count(inputs[0], padding))

    def count(self, ids: Any, padding: int) -> None:
        """Add the positions of a forward pass, and how many of them are no padding."""
        self._positions += ids.numel()
        self._tokens += int((ids != padding).sum())

    def stop(
        self,
        prompts: Sequence[int],
        responses: Sequence[float],
        phases: dict[str, float] | None = None,
    ) -> None:
        """End the iteration and print it; what no phase had is "other".

        Args:
            prompts: Tokens of each prompt.
            responses: Tokens of each response.
            phases: Seconds that the system measured itself, instead of marks.
        """
        assert self._began is not None
        now = self._clock()
        wall = now - self._began
        known = phases if phases is not None else self._phases
        others = busy_seconds() - self._busy - (time.process_time() - self._own)
        line = {
            "iteration": self.iteration,
            "seconds": wall,
            "phases": {**known, "other": wall - sum(known.values())},
            "prompts": list(prompts),
            "responses": list(responses),
            "positions": self._positions,
            "tokens": self._tokens,
            "peak_bytes": peak_bytes(),
            "other_cores": max(others / wall, 0.0),
            "note": self.note,
        }
        self.say(line)
        self.iteration += 1
        self._began = None

    def say(self, line: dict[str, Any]) -> None:
        """Print what was measured of an iteration."""
        print(json.dumps(line), flush=True)
