"""What is compared with what, and what was aimed at. The order is the order of importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.speed.task import Task

OURS, GENERATE = Task("ours"), Task("generate", work="rollout")
CLASSIC, LAST, NEW = Task("trl_classic"), Task("trl_last", critic="separate"), Task("trl_new")
NAMES = {
    "ours": "suasion",
    "generate": "transformers `generate`",
    "trl_classic": "TRL 0.11.4",
    "trl_last": "TRL 1.12.0",
    "trl_new": "TRL 1.16.0",
}


@dataclass(frozen=True)
class Row:
    """One comparison on one shape and family."""

    what: str
    """In words."""
    ours: Task
    peer: Task
    target: float | None = None
    """Ours over the peer; None where nothing was aimed at."""
    measure: str = "speed"
    """speed or memory; of memory less is better."""


FP32 = {"precision": "fp32", "matmul": "fast"}
ALL = (
    # what, ours, peer, target on S and on M
    (
        "PPO, value head on trunk, fp32, faster matmul given to both",
        OURS.on(**FP32), CLASSIC.on(**FP32), (2.6, 2.0),
    ),
    (
        "PPO, value head on trunk, bf16 (the peer's weights too)",
        OURS.on(precision="bf16"), CLASSIC.on(precision="bf16"), (2.5, 2.0),
    ),
    ("PPO, value head on trunk, `auto` against as installed", OURS, CLASSIC, (4.0, 5.0)),
    (
        "PPO, separate critic, fp32, faster matmul given to both",
        OURS.on(critic="separate", **FP32), LAST.on(**FP32), (2.6, 2.7),
    ),
    (
        "PPO, separate critic, `auto` against as installed",
        OURS.on(critic="separate"), LAST, (4.5, 6.0),
    ),
    ("PPO with LoRA, `auto` against as installed", OURS.on(lora=True), CLASSIC.on(lora=True),
     (4.0, 4.5)),
    ("rollout alone, `auto` against fp32", OURS.on(work="rollout"), GENERATE, (3.5, 4.0)),
    (
        "supervised steps, packed, `auto` against as installed (`wrapped`)",
        OURS.on(work="sft"), NEW.on(work="sft"), (2.5, 4.0),
    ),
    (
        "reward-model steps, `auto` against as installed",
        OURS.on(work="reward"), NEW.on(work="reward"), (2.0, 4.5),
    ),
)  # fmt: skip
MORE = (
    (
        "supervised steps, `auto` against fp32 without checkpointing",
        OURS.on(work="sft"), NEW.on(work="sft", precision="fp32"),
    ),
    (
        "supervised steps, bf16 in both, no checkpointing",
        OURS.on(work="sft", precision="bf16"), NEW.on(work="sft", precision="bf16"),
    ),
    (
        "reward-model steps, `auto` against fp32 without checkpointing",
        OURS.on(work="reward"), NEW.on(work="reward", precision="fp32"),
    ),
    (
        "reward-model steps, bf16 in both, no checkpointing",
        OURS.on(work="reward", precision="bf16"), NEW.on(work="reward", precision="bf16"),
    ),
)  # fmt: skip
ONE_EPOCH = (
    ("PPO of one epoch, `auto` against as installed", OURS.on(epochs=1), CLASSIC.on(epochs=1)),
)
PAGES = (
    (
        "PPO, `auto` against as installed, freed memory kept by both",
        OURS.on(keep_pages=True), CLASSIC.on(keep_pages=True),
    ),
    (
        "PPO, bf16, freed memory kept by both",
        OURS.on(keep_pages=True, precision="bf16"), CLASSIC.on(keep_pages=True, precision="bf16"),
    ),
)  # fmt: skip
MEMORY = "peak resident memory of a PPO iteration, `auto` against as installed"
MEMORY_TARGETS = {"S": 0.6, "M": 0.55}
LEAN = (
    ("peak memory, short micro-batches against as installed", OURS.on(lean=True), CLASSIC),
    (
        "peak memory, LoRA in both, short micro-batches in ours",
        OURS.on(lean=True, lora=True), CLASSIC.on(lora=True),
    ),
)  # fmt: skip
LEAN_TARGET = 0.5
"""On M; below some hundred megabytes the libraries themselves decide."""


def rows(shape: str, family: str) -> Iterator[Row]:
    """Every comparison on a shape and family."""
    at = {"S": 0, "M": 1}.get(shape)

    def on(task: Task) -> Task:
        return task.on(shape=shape, family=family)

    for what, ours, peer, targets in ALL:
        target = targets[at] if at is not None and family == "gpt2" else None
        yield Row(what, on(ours), on(peer), target)
    target = MEMORY_TARGETS.get(shape) if family == "gpt2" else None
    yield Row(MEMORY, on(OURS), on(CLASSIC), target, "memory")
    for what, ours, peer in LEAN:
        target = LEAN_TARGET if shape == "M" and family == "gpt2" else None
        yield Row(what, on(ours), on(peer), target, "memory")
    for what, ours, peer in (*MORE, *ONE_EPOCH, *PAGES):
        yield Row(what, on(ours), on(peer))


def core(shape: str, family: str) -> Iterator[Row]:
    """Those that something was aimed at."""
    first = {what for what, *_ in (*ALL, *LEAN)} | {MEMORY}
    yield from (row for row in rows(shape, family) if row.what in first)


def same_arithmetic(shape: str, family: str) -> Iterator[Row]:
    """Supervised and reward-model steps against what the peer can do when told to."""
    told = {what for what, *_ in MORE}
    yield from (row for row in rows(shape, family) if row.what in told)


def same_allocator(shape: str, family: str) -> Iterator[Row]:
    """What is left where the peer keeps freed memory too."""
    told = {what for what, *_ in PAGES}
    yield from (row for row in rows(shape, family) if row.what in told)


AXES = {
    "batch": (8, 16, 32, 64),
    "response": (32, 64, 128, 256),
    "vocabulary": (8192, 32768, 131072),
}
"""What grows, from where to where; the others stay at the task's default."""


def growth(system: Task) -> Iterator[Task]:
    """One task for each point of each axis; responses go to their limit, so that points compare."""
    iterations = 3 if system == OURS else 2
    for axis, points in AXES.items():
        for point in points:
            size = 0 if (axis, point) == ("vocabulary", 8192) else point  # S has these
            yield system.on(**{axis: size}, ending=False, iterations=iterations)
