"""Where our seconds go, by kind of operation, beside the floor: what stands between it and us.

    python -m benchmarks.speed.where [--shape S M] [--out docs/benchmarks/where.md]

Runs each kind of work as `make bench` does, with torch's profiler over the last iteration. That
slows small operations down, so the shares are a guide; the seconds are of the iterations before.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.floor import floor_of
from benchmarks.speed.models import prepare
from benchmarks.speed.ours import WORK
from benchmarks.speed.probe import Probe
from benchmarks.speed.rates import SIZE, measure
from benchmarks.speed.store import ROOT, fastest
from benchmarks.speed.task import Task
from suasion.core.files import write_text
from suasion.core.memory import reuse_memory

KINDS = {
    "products": r"aten::(mm|addmm|bmm|baddbmm)$|_linear|mkldnn",
    "attention": r"attention|OneByOne",
    "vocabulary": r"[sS]oftmax|aten::(exp|gather|scatter_add_?|cumsum|searchsorted)$",
    "activations, norms": r"gelu|silu|tanh|relu|_norm|aten::(pow|rsqrt)$",
    "optimizer": r"adam|Adam|foreach",
    "copies, conversions": r"copy|aten::(cat|clone|fill_|zero_|index|index_put_|_index_put_impl_|"
    r"index_select|embedding|embedding_dense_backward)$",
    "elementwise": r"aten::(add|add_|sub|sub_|mul|mul_|div|div_|neg|sum|mean|where|masked_fill_)$",
}
"""Kinds of operations, by their names in the profile; the first that fits counts."""
SPARE = 1 << 28
"""Numbers, 1 GB."""
OTHER, PYTHON = "other operations", "Python, dispatch"
ABOUT = """One iteration of each kind of work of [the benchmarks](../benchmarks.md), ours alone:
what stands between it and the floor. Seconds are medians of the iterations that were not profiled;
the floor is the time of the matrix products on real tokens at the best rate measured in this run,
and of the optimizer's memory traffic. Shares are of one profiled iteration, where every operation
takes a microsecond or two more, of which much is counted as Python and dispatch. Products take
longer than the floor where they have few rows (decoding reads all weights for each token) or shapes
that run at less than the best rate."""


def tasks(shape: str) -> list[Task]:
    """Each kind of work once."""
    plain = {"system": "ours", "shape": shape, "iterations": 4}
    return [
        Task(**plain),
        Task(**plain, lora=True),
        Task(**plain, work="rollout"),
        Task(**plain, work="sft"),
        Task(**plain, work="reward"),
    ]


class Profiled(Probe):
    """A probe that also profiles the last iteration.

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

    def stop(self, *arguments: Any, **named: Any) -> None:
        """End it; the last one's line is followed by one of microseconds by operation."""
        super().stop(*arguments, **named)
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            spent = {e.key: e.self_cpu_time_total for e in self._profile.key_averages()}
            print(json.dumps({"operations": spent}), flush=True)


def shares(operations: dict[str, float], seconds: float) -> dict[str, float]:
    """Share of an iteration by kind; what no operation had is Python's.

    Args:
        operations: Microseconds by name.
        seconds: Of the iteration.
    """
    found = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, spent in operations.items():
        kind = next((k for k, names in KINDS.items() if re.search(names, name)), OTHER)
        found[kind] += spent / 1e6 / seconds
    return {**found, PYTHON: max(0.0, 1 - sum(found.values()))}


def row(task: Task, root: Path, rates: dict[str, Any]) -> str:
    """Run a task in a process of its own; its line of the table."""
    prepare(task, root)
    done = subprocess.run(  # noqa: S603 (ourselves)
        [sys.executable, "-m", "benchmarks.speed.where", "--task", task.text(), "--models", root],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    *counted, profiled, operations = lines[1:]
    seconds = statistics.median(line["seconds"] for line in counted)
    mode = fastest(rates, exact=task.precision == "fp32")
    floors = [sum(floor_of(task, line, rates, mode).values()) for line in counted]
    parts = shares(operations["operations"], profiled["seconds"])
    name = task.name.removeprefix("ours").strip() or "PPO"
    cells = [name, f"{seconds:.2f}", f"{statistics.median(floors):.2f}"]
    return "| " + " | ".join([*cells, *(f"{share:.0%}" for share in parts.values())]) + " |"


def main(arguments: Sequence[str]) -> None:
    """Print the tables; `--task` is the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["S", "M"])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "bench" / "models")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.task:
        task = Task.parse(given.task)
        reuse_memory()
        WORK[task.work](task, task.folder(given.models), Profiled(task.iterations))
        return
    rates = measure(SIZE)
    lines = ["# Where the seconds go", "", textwrap.fill(ABOUT, 100), ""]
    for shape in given.shape:
        head = ["work", "s", "floor", *KINDS, OTHER, PYTHON]
        lines += [f"## GPT-2 {shape}", "", "| " + " | ".join(head) + " |"]
        lines += ["|" + " --- |" * len(head)]
        lines += [row(task, given.models, rates) for task in tasks(shape)]
        lines += [""]
    text = "\n".join(lines)
    if given.out:
        write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
