"""In which order tasks run, so that a run cut short has measured what matters most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from benchmarks.speed.rows import (
    CLASSIC,
    OURS,
    Row,
    core,
    growth,
    rows,
    same_allocator,
    same_arithmetic,
)
from benchmarks.speed.task import Task

EXACT = 1e-5
"""Relative error up to which a product of fp32 matrices counts as fp32."""
ITERATIONS = {"S": 6, "M": 4, "tiny": 2}
"""Of each process, the first one included."""
STEPS = {"S": 8, "M": 5, "tiny": 2}
"""The same of the stages whose iterations are optimizer steps."""
NO_PEER = ("ours", "generate")


def settled(task: Task, rates: Mapping[str, float]) -> Task:
    """The task as it is run on this machine.

    Where the back end that is faster in fp32 rounds to less than that, it is no fp32 and nobody is
    given it; and a peer as installed is a peer in fp32, except in the stages that have a default.
    """
    changes: dict[str, object] = {}
    if task.system == "ours" or rates["fp32 fast error"] > EXACT:
        changes["matmul"] = "default"
    if task.system in {"trl_classic", "trl_last"} and task.precision == "fp32":
        changes["precision"] = "default"
    if task.ending:
        stage = task.work in {"sft", "reward"}
        changes["iterations"] = (STEPS if stage else ITERATIONS)[task.shape]
    return task.on(**changes)


def pairs(compared: Iterable[Row], *, turned: bool) -> Iterator[Task]:
    """Both sides of each comparison, one after the other."""
    for row in compared:
        yield from (row.peer, row.ours) if turned else (row.ours, row.peer)


def full() -> list[tuple[int, Task]]:
    """Every task with its round."""
    main = [row for row in core("M", "llama") if "`auto` against as installed" in row.what][:1]
    first = chain(
        pairs(core("S", "gpt2"), turned=False),
        pairs(core("M", "gpt2"), turned=False),
        pairs(same_allocator("S", "gpt2"), turned=False),
        pairs(same_allocator("M", "gpt2"), turned=False),
        pairs(same_arithmetic("M", "gpt2"), turned=False),
        pairs(core("S", "llama"), turned=False),
        pairs(main, turned=False),
        growth(OURS),
        pairs(rows("S", "gpt2"), turned=False),
        growth(CLASSIC),
        pairs(rows("M", "gpt2"), turned=False),
    )
    second = chain(
        pairs(core("S", "gpt2"), turned=True),
        pairs(core("M", "gpt2"), turned=True),
        pairs(core("S", "llama"), turned=True),
        pairs(main, turned=True),
    )
    return [(1, task) for task in first] + [(2, task) for task in second]


def quick() -> list[tuple[int, Task]]:
    """Our own side on a model of nothing, to see that everything runs."""
    kinds = {task for task in pairs(core("tiny", "gpt2"), turned=False) if task.system in NO_PEER}
    return [(1, task) for task in sorted(kinds)]


def once(planned: Iterable[tuple[int, Task]]) -> list[tuple[int, Task]]:
    """Each task once in each round."""
    return list(dict.fromkeys(planned))
