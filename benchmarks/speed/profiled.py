"""Our side again, with torch's profiler over the last iteration.

python -m benchmarks.speed.profiled TASK FOLDER, as `benchmarks.speed.ours` takes them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import ours
from benchmarks.speed.probe import Probe
from benchmarks.speed.task import Task

SPARE = 1 << 28
"""Numbers, 1 GB."""


class Profiled(Probe):
    """A probe whose last line also has `operations`: microseconds by name.

    What the profiler notes down lies between the memory that tensors had, which would then take new
    pages, and those take long to clear; so there is some to spare.

    Args:
        iterations: How many there will be.
    """

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self._last_one = iterations - 1
        self._profile: Any = None

    def start(self) -> None:
        """Begin an iteration."""
        if self.iteration == self._last_one:
            torch.ones(SPARE)  # kept for the next tensors, as it is freed
            self._profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)
            self._profile.__enter__()
        super().start()

    def say(self, line: dict[str, Any]) -> None:
        """Print what was measured of an iteration."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            found = self._profile.key_averages()
            line["operations"] = {event.key: event.self_cpu_time_total for event in found}
        super().say(line)


def main(text: str, root: str) -> None:
    """Do one task."""
    ours.main(text, root, Profiled(Task.parse(text).iterations))


if __name__ == "__main__":
    main(*sys.argv[1:])
