"""Where our seconds go, by kind of operation, beside the floor: what stands between it and us.

    python -m benchmarks.speed.where [--shape S M] [--out docs/benchmarks/where.md]

Runs each kind of work as `make bench` does, with torch's profiler over the last iteration. That
slows small operations down, so the shares are a guide; the seconds are of the iterations before.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.speed.__main__ import SCRATCH, made_with
from benchmarks.speed.models import prepare
from benchmarks.speed.page import head, table_lines
from benchmarks.speed.rates import SIZE, measure
from benchmarks.speed.store import Summary, in_process_of_its_own
from benchmarks.speed.task import Task
from suasion.core.files import write_text

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
    plain = {"system": "profiled", "shape": shape, "iterations": 4}
    return [
        Task(**plain),
        Task(**plain, lora=True),
        Task(**plain, work="rollout"),
        Task(**plain, work="sft"),
        Task(**plain, work="reward"),
    ]


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


def row(task: Task, root: Path, rates: Mapping[str, float]) -> list[str]:
    """Run a task in a process of its own; its line of the table."""
    prepare(task, root)
    *readings, profiled = in_process_of_its_own(task, root)
    found = Summary(task, readings[1:])
    floor = sum(found.floors(rates, exact=False).values())
    parts = shares(profiled["operations"], profiled["seconds"])
    name = task.name.removeprefix(task.system).strip() or "PPO"
    return [name, f"{found.seconds:.2f}", f"{floor:.2f}", *(f"{x:.0%}" for x in parts.values())]


def main(arguments: Sequence[str]) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=["S", "M"])
    parser.add_argument("--models", type=Path, default=SCRATCH / "models")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    began, rates = time.monotonic(), measure(SIZE)
    header = ["work", "s", "floor", *KINDS, OTHER, PYTHON]
    lines = []
    for shape in given.shape:
        table = [row(task, given.models, rates) for task in tasks(shape)]
        lines += [f"## GPT-2 {shape}", "", *table_lines(header, table), ""]
    command = f"python -m benchmarks.speed.where --shape {' '.join(given.shape)}"
    made = made_with((time.monotonic() - began) / 60, command)
    text = "\n".join([head("Where the seconds go", ABOUT, made=made), *lines])
    if given.out:
        write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
