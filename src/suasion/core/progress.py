"""One way to show how far a long job is: rate and time left, on a terminal or in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 10.0
"""Without a terminal, at most one line in this time."""


class Meter:
    """Progress of one job; use as a context manager and call `advance`.

    Args:
        console: Where to write.
        title: What is being done.
        total: Units in all.
        unit: Name of a unit, for the rate.
        clock: Seconds from an arbitrary zero.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._unit = unit
        self._clock = clock
        self._done = 0
        self._resumed = 0
        self._began = self._spoke = clock()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start_at(self, done: int) -> None:
        """Say that `done` units were finished in an earlier session."""
        self._done = self._resumed = done
        if self._bar:
            self._bar.update(self._task, completed=done)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done; `note` is shown beside the rate."""
        self.reach(self._done + units, note)

    def reach(self, done: int, note: str = "") -> None:
        """Set the count of finished units to `done`."""
        self._done = done
        now = self._clock()
        elapsed = max(now - self._began, 1e-9)
        rate = (self._done - self._resumed) / elapsed
        text = f"{rate:,.1f} {self._unit}/s  {note}".rstrip()
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=text)
        elif now - self._spoke >= QUIET_SECONDS:
            self._spoke = now
            left = (self._total - self._done) / rate if rate else float("inf")
            self._console.print(
                f"  {self._title}: {self._done:,}/{self._total:,}  {text}  {left:,.0f} s left",
                highlight=False,
            )
