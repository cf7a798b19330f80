"""Readings: taken by processes of the systems, kept line by line, summed up as medians."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.floor import floor_of
from benchmarks.speed.plan import EXACT
from benchmarks.speed.probe import QUIET, busy_seconds
from benchmarks.speed.task import KEEP_PAGES, Task
from suasion.core.files import append_json_line, read_json_lines

ROOT = Path(__file__).parents[2]
PEERS = {"trl_classic": "classic", "trl_last": "last", "trl_new": "new"}
LIMIT = 600
"""Seconds after which a process is given up."""
PATIENCE = 10
"""Seconds to wait for other processes to end."""
Run = Callable[[Task, Path], list[dict[str, Any]]]
"""(task, models' folder) -> readings."""


def python_of(system: str) -> Path:
    """The interpreter of a system's environment."""
    if system not in PEERS:
        return Path(sys.executable)
    return ROOT / ".peers" / PEERS[system] / "bin" / "python"


def in_process_of_its_own(task: Task, models: Path) -> list[dict[str, Any]]:
    """Run a task in its system's environment.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if task.keep_pages:
        environment |= KEEP_PAGES
    command = [str(python_of(task.system)), "-m", f"benchmarks.speed.{task.system}"]
    try:
        done = subprocess.run(  # noqa: S603
            [*command, task.text(), str(models)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}"[:300]) from error
    if done.returncode:
        raise RuntimeError("; ".join(done.stderr.strip().splitlines()[-2:]) or "no message")
    return readings_in(done.stdout)


def in_this_process(task: Task, models: Path) -> list[dict[str, Any]]:
    """Run a task of ours here, for a dry run."""
    said = io.StringIO()
    before = torch.get_float32_matmul_precision()
    try:
        with contextlib.redirect_stdout(said):
            module = importlib.import_module(f"benchmarks.speed.{task.system}")
            module.main(task.text(), str(models))
    finally:
        torch.set_float32_matmul_precision(before)
    return readings_in(said.getvalue())


def readings_in(text: str) -> list[dict[str, Any]]:
    """The readings among what a process printed; its libraries talk as well."""
    lines = [line for line in text.splitlines() if line.startswith('{"iteration"')]
    return [json.loads(line) for line in lines]


def wait_for_quiet(patience: float = PATIENCE) -> float:
    """Wait until others use less than QUIET cores, or patience ends; what they use."""
    until = time.monotonic() + patience
    while True:
        before, busy = time.monotonic(), busy_seconds()
        time.sleep(1.0)
        used = (busy_seconds() - busy) / (time.monotonic() - before)
        if used <= QUIET or time.monotonic() > until:
            return used


class Store:
    """Readings of all tasks, in a file of JSON lines that a later run continues.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = list(read_json_lines(path)) if path.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, row)
        self.rows.append(row)

    def has(self, number: int, task: Task) -> bool:
        """Whether a task was run in this round, with or without success."""
        return any(row.get("task") == task.text() and row["round"] == number for row in self.rows)

    def of(self, task: Task) -> Summary | None:
        """A task's readings summed up; None where there are none."""
        found = [
            reading
            for row in self.rows
            if row.get("task") == task.text()
            for reading in row.get("readings", ())
            if reading["iteration"] > 0
        ]
        return Summary(task, found) if found else None

    def failure(self, task: Task) -> str | None:
        """What a task's process died of."""
        errors = [
            row["error"] for row in self.rows if row.get("task") == task.text() and "error" in row
        ]
        return errors[-1] if errors else None

    @property
    def rates(self) -> dict[str, float]:
        """The best of every rate measured: a ceiling; and the largest of every error."""
        found: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.get("rates", {}).items():
                found[name] = max(found.get(name, 0.0), value)
        return found


def fastest(rates: Mapping[str, float], *, exact: bool) -> str:
    """The way to multiply with the highest rate, of those exact to fp32 or of all."""
    modes = [name.removesuffix(" flops") for name in rates if name.endswith(" flops")]
    kept = [mode for mode in modes if not exact or rates[f"{mode} error"] <= EXACT]
    return max(kept, key=lambda mode: rates[f"{mode} flops"])


@dataclass(frozen=True)
class Summary:
    """Medians over a task's counted iterations, the undisturbed ones where there are any."""

    task: Task
    readings: Sequence[dict[str, Any]]

    @property
    def used(self) -> list[dict[str, Any]]:
        """The readings that count."""
        quiet = [row for row in self.readings if row["other_cores"] <= QUIET]
        return quiet or list(self.readings)

    @property
    def disturbed(self) -> bool:
        """Whether there was not one undisturbed reading."""
        return all(row["other_cores"] > QUIET for row in self.readings)

    @property
    def note(self) -> str:
        """What the system said about itself, where it did."""
        return str(self.readings[-1].get("note", ""))

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase."""
        names = dict.fromkeys(name for row in self.used for name in row["phases"])
        return {name: self._median(lambda row, n=name: row["phases"].get(n, 0.0)) for name in names}  # type: ignore[misc]

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return self._median(lambda row: row["seconds"])

    @property
    def rate(self) -> float:
        """Response tokens, trained tokens, or pairs of mean length, per second."""
        return self._median(lambda row: self._amount(row) / row["seconds"])

    @property
    def peak_bytes(self) -> float:
        """Largest resident memory within an iteration: the largest of all, not a median."""
        return float(max(row["peak_bytes"] for row in self.readings))

    @property
    def padding(self) -> float:
        """Share of the positions computed that were padding."""
        return self._median(lambda row: 1 - row["tokens"] / max(row["positions"], 1))

    def times_floor(self, rates: Mapping[str, float], *, exact: bool) -> float:
        """How many times the least time an iteration took."""
        mode = fastest(rates, exact=exact)
        return self._median(
            lambda row: row["seconds"] / sum(floor_of(self.task, row, rates, mode).values())
        )

    def floors(self, rates: Mapping[str, float], *, exact: bool) -> dict[str, float]:
        """Least seconds by phase."""
        mode = fastest(rates, exact=exact)
        found = [floor_of(self.task, row, rates, mode) for row in self.used]
        return {name: statistics.median(row[name] for row in found) for name in found[0]}

    def _amount(self, row: dict[str, Any]) -> float:
        if self.task.work == "sft":
            return float(row["tokens"])
        if self.task.work == "reward":
            return float(row["tokens"] / sum(row["responses"]) * len(row["responses"]) / 2)
        return float(sum(row["responses"]))

    def _median(self, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(row) for row in self.used)
