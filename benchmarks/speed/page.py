"""docs/benchmarks.md from the readings: nothing in it is written by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.speed.panels import Panel, panels
from benchmarks.speed.plan import EXACT, settled
from benchmarks.speed.probe import QUIET
from benchmarks.speed.rates import MODES
from benchmarks.speed.rows import AXES, CLASSIC, NAMES, OURS, Row, growth, rows
from benchmarks.speed.store import Store, Summary
from benchmarks.speed.task import SHAPES, Task

GIGA = 1e9
FAMILIES = {"gpt2": "GPT-2", "llama": "Llama"}
UNITS = {"sft": "tokens/s", "reward": "pairs/s"}
DISTURBED = " (d)"
HOW = """Every system does the same work on the same saved models (random weights, EOS at about one
token in fifty) and prompts (8 to 64 tokens), in a process and an environment of its own, one after
the other in turns. Shapes: {shapes}. PPO: 16 responses of up to 64 tokens per iteration, 4 epochs
of one mini-batch of 16, a reward model of the policy's shape scored in the loop. The first
iteration of each process is dropped; figures are medians of the others."""
MEASURES = f"""Speed is response tokens per second (supervised: tokens; reward model: pairs of mean
length), since sampled lengths differ. The floor is the time of the matrix products that the work
consists of, on real tokens alone, at the best rate measured in this run, and of the optimizer's
memory traffic (benchmarks/speed/floor.py). Memory is the largest resident size within any
iteration. suasion keeps freed memory for the next tensors, and few kernels
(src/suasion/core/memory.py), peers as installed do not; rows that say so give both to both.
{DISTURBED.strip()}: other processes used more than {QUIET} cores during every reading of one
side. What stands between suasion and the floor: [where the seconds go](benchmarks/where.md)."""
READINGS = "Every reading: [benchmarks/readings.json](benchmarks/readings.json)."
ROUNDS = """On this processor the faster way to multiply fp32 matrices rounds them to bf16 (see its
error), so it is no fp32: nobody was given it, and fp32 rows use the default."""
GROWTH = """GPT-2 S, PPO as installed; every response goes to its limit. What is not named is batch
16, response 64, vocabulary 8192."""
DETAIL = """Seconds by phase, the floor's in brackets (fp32 for tasks that ask for fp32, else the
fastest arithmetic of the machine, for peers too); share of the positions computed that were
padding; readings used, the undisturbed ones where there are any."""


def page(store: Store, made: Mapping[str, str], shapes: Iterable[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        store: The readings.
        made: When, where and how.
        shapes: Pairs of shape and family that have a table.
    """
    compared = {(shape, family): list(rows(shape, family)) for shape, family in shapes}
    parts = [_head(made), _rates(store)]
    parts += [_comparison(store, *key, compared[key]) for key in compared]
    parts += [_growth(store), _detail(store, [row for some in compared.values() for row in some])]
    return "\n".join(parts)


def growth_points(store: Store, system: Task, axis: str) -> list[tuple[int, Summary]]:
    """What was measured along an axis."""
    found = []
    for task in growth(system):
        others = [name for name in AXES if name != axis]
        if any(_size(task, name) != _size(Task("ours"), name) for name in others):
            continue
        summary = store.of(settled(task, store.rates))
        if summary is not None:
            found.append((_size(task, axis), summary))
    return sorted(dict(found).items())


def drawing(store: Store) -> str:
    """Seconds and memory along each axis."""
    names = {"suasion": OURS, "TRL 0.11.4": CLASSIC}
    measures = {
        "seconds per iteration": lambda found: found.seconds,
        "peak resident memory, GB": lambda found: found.peak_bytes / GIGA,
    }
    return panels(
        [
            [
                Panel(
                    title,
                    axis,
                    {
                        name: [(x, value(s)) for x, s in growth_points(store, system, axis)]
                        for name, system in names.items()
                    },
                )
                for axis in AXES
            ]
            for title, value in measures.items()
        ]
    )


def _head(made: Mapping[str, str]) -> str:
    shapes = "; ".join(
        f"{name}: {layers} layers of width {width}, {heads} heads, vocabulary {size}"
        for name, (layers, width, heads, size) in SHAPES.items()
        if name != "tiny"
    )
    how = HOW.format(shapes=shapes)
    return head("Speed and memory, beside the peers", how, MEASURES, made=made, more=READINGS)


def head(title: str, *paragraphs: str, made: Mapping[str, str], more: str = "") -> str:
    """The beginning of a page: what it is, and when, where and how it was made."""
    told = ", ".join(f"{key} {value}" for key, value in made.items() if key != "command")
    written = f"Written by `{made.get('command', '')}`: {told}. {more}".rstrip()
    return "\n\n".join([f"# {title}", *map(fill, [*paragraphs, written])]) + "\n"


def _rates(store: Store) -> str:
    rates = store.rates
    table = [
        (name, f"{rates[f'{name} flops'] / GIGA:.0f}", f"{rates[f'{name} error']:.1e}")
        for name in MODES
    ]
    lines = ["## The machine", "", *table_lines(("matrix product", "GFLOP/s", "error"), table), ""]
    copied = rates["copy_bytes_per_second"] / GIGA
    lines.append(f"Memory copy: {copied:.0f} GB/s, read and written bytes both counted.")
    if rates["fp32 fast error"] > EXACT:
        lines += [
            "",
            fill(ROUNDS),
        ]
    return "\n".join([*lines, ""])


def _comparison(store: Store, shape: str, family: str, compared: Sequence[Row]) -> str:
    table = []
    for row in compared:
        ours, peer = (settled(task, store.rates) for task in (row.ours, row.peer))
        if row.target is not None or (store.of(ours) and store.of(peer)):
            table.append(_line(store, row, ours, peer))
    header = (
        "work", "against", "suasion", "peer", "ratio", "target", "suasion / floor", "peer / floor",
    )  # fmt: skip
    # What has no target and was not measured in this run is left out.
    lines = [f"## {FAMILIES[family]} {shape}", "", *table_lines(header, table), ""] if table else []
    return "\n".join(lines)


def _line(store: Store, row: Row, ours: Task, peer: Task) -> tuple[str, ...]:
    first, second = store.of(ours), store.of(peer)
    target = "" if row.target is None else f"{row.target:g}"
    if row.measure == "memory":
        target = target and f"at most {target}"
        shown = [_memory(found) for found in (first, second)]
        ratio = first.peak_bytes / second.peak_bytes if first and second else None
        floors = ["", ""]
    else:
        shown = [_speed(found) for found in (first, second)]
        ratio = first.rate / second.rate if first and second else None
        exact = row.ours.precision == "fp32"
        floors = [
            f"{found.times_floor(store.rates, exact=exact):.1f}" if found else ""
            for found in (first, second)
        ]
    mark = DISTURBED if any(found and found.disturbed for found in (first, second)) else ""
    said = "" if ratio is None else f"**{ratio:.2f}**{mark}"
    return (row.what, NAMES[peer.system], *shown, said, target, *floors)


def _growth(store: Store) -> str:
    table = []
    for axis in AXES:
        for name, system in (("suasion", OURS), ("TRL 0.11.4", CLASSIC)):
            for size, found in growth_points(store, system, axis):
                table.append((f"{axis} {size}", name, f"{found.seconds:.2f}", _memory(found)))
    lines = ["## How cost grows", "", fill(GROWTH), ""]
    lines += ["![Seconds and memory as batch, response and vocabulary grow](benchmarks/growth.svg)"]
    return "\n".join([*lines, "", *table_lines(("what", "system", "s", "peak"), table), ""])


def _detail(store: Store, compared: Sequence[Row]) -> str:
    """Every task: where its seconds go, beside the floor's."""
    both = [settled(task, store.rates) for row in compared for task in (row.ours, row.peer)]
    table = []
    for task in dict.fromkeys(both):
        found = store.of(task)
        failure = store.failure(task)
        if found is None:
            if failure:
                table.append((task.name, f"failed: {_plain(failure)}", *[""] * 7))
            continue
        floors = found.floors(store.rates, exact=task.precision == "fp32")
        phases = [
            f"{found.phases[name]:.2f}" + (f" ({floors[name]:.2f})" if name in floors else "")
            if name in found.phases
            else ""
            for name in ("rollout", "scoring", "update", "other")
        ]
        count = f"{len(found.used)} of {len(found.readings)}"
        cells = (*phases, _speed(found), f"{found.padding:.0%}", _memory(found), count)
        table.append((f"{task.name}{found.note and f': {found.note}'}", *cells))
    header = (
        "task", "rollout", "scoring", "update", "other", "speed", "padding", "peak", "readings",
    )  # fmt: skip
    return "\n".join(["## Every task", "", fill(DETAIL), "", *table_lines(header, table), ""])


def _speed(found: Summary | None) -> str:
    if found is None:
        return ""
    return f"{found.rate:.3g} {UNITS.get(found.task.work, 'tokens/s')}"


def _memory(found: Summary | None) -> str:
    return "" if found is None else f"{found.peak_bytes / GIGA:.2f} GB"


def _size(task: Task, axis: str) -> int:
    return task.vocabulary_size if axis == "vocabulary" else int(getattr(task, axis))


def table_lines(header: Sequence[str], table: Sequence[Sequence[Any]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *table]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]


def _plain(text: str) -> str:
    """An error's message in a table cell."""
    return text.replace("|", "/").replace("\n", " ")[:160]


def fill(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(text, 100)
