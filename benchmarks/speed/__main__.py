"""Measure our speed and memory beside the peers' and write docs/benchmarks.md: `make bench`.

    python -m benchmarks.speed [--minutes 45] [--resume] [--quick] [--page] [--out docs]

The peers' environments are made by `make bench-peers`; a system whose environment is missing is
left out. Readings are kept as they come, in runs/bench/readings.jsonl: a run that was cut short
goes on with --resume, and --page writes the page from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.speed.models import prepare
from benchmarks.speed.page import drawing, page
from benchmarks.speed.plan import full, once, quick, settled
from benchmarks.speed.rates import SIZE, measure
from benchmarks.speed.store import (
    PATIENCE,
    ROOT,
    Run,
    Store,
    in_process_of_its_own,
    in_this_process,
    python_of,
    wait_for_quiet,
)
from benchmarks.speed.task import Task
from suasion.core.files import write_text

SCRATCH = ROOT / "runs" / "bench"
READINGS = Path("benchmarks") / "readings.json"
TABLES = (("S", "gpt2"), ("M", "gpt2"), ("S", "llama"), ("M", "llama"))


def processor() -> str:
    """The name that the processor gives itself."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def made_with(minutes: float, command: str) -> dict[str, str]:
    """When, where and how the readings came about."""
    packages = ("suasion", "torch", "transformers", "numpy")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "minutes": f"{minutes:.0f}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def run(
    planned: Sequence[tuple[int, Task]],
    store: Store,
    models: Path,
    *,
    runner: Run,
    minutes: float,
    patience: float,
    console: Console,
) -> None:
    """Run what is planned and not there yet, until the time is up."""
    until = time.monotonic() + 60 * minutes
    left = [(number, settled(task, store.rates)) for number, task in planned]
    left = [entry for entry in once(left) if not store.has(*entry)]
    for done, (number, task) in enumerate(left):
        if time.monotonic() > until:
            console.print(f"time is up: {len(left) - done} tasks left; go on with --resume")
            return
        if not python_of(task.system).is_file():
            continue
        prepare(task, models)
        load = wait_for_quiet(patience)
        row = {"task": task.text(), "round": number, "load_before": load}
        began = time.monotonic()
        try:
            row["readings"] = runner(task, models)
        except RuntimeError as error:
            row["error"] = str(error)
        row["seconds"] = time.monotonic() - began
        store.add(row)
        note = row.get("error", f"{len(row.get('readings', []))} readings")  # type: ignore[arg-type]
        console.print(f"{done + 1}/{len(left)}  {row['seconds']:.0f} s  {task.name}: {note}")


def write(store: Store, out: Path, made: dict[str, str], tables: Sequence[tuple[str, str]]) -> None:
    """The page, its drawing and the readings."""
    lines = ",\n".join(json.dumps(row) for row in [{"made": made}, *store.rows])
    write_text(out / READINGS, f"[\n{lines}\n]\n")
    write_text(out / "benchmarks" / "growth.svg", drawing(store))
    write_text(out / "benchmarks.md", page(store, made, tables))


def main(arguments: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0, help="start nothing after this")
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--quick", action="store_true", help="ours alone, on a model of nothing")
    parser.add_argument("--page", action="store_true", help="write the page of that run again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="models and readings")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    transformers_logging.disable_progress_bar()
    path = given.scratch / "readings.jsonl"
    if not (given.resume or given.page):
        path.unlink(missing_ok=True)
    store = Store(path)
    began = time.monotonic()
    if not given.page:
        wait_for_quiet(0.0 if given.quick else PATIENCE)
        store.add({"rates": measure(64 if given.quick else SIZE), "round": 0})
        run(
            quick() if given.quick else full(),
            store,
            given.scratch / "models",
            runner=in_this_process if given.quick else in_process_of_its_own,
            minutes=given.minutes,
            patience=0.0 if given.quick else PATIENCE,
            console=console,
        )
    command = f'make bench BENCH="{" ".join(arguments)}"' if arguments else "make bench"
    if given.page:
        made = json.loads((given.out / READINGS).read_text(encoding="utf-8"))[0]["made"]
    else:
        made = made_with((time.monotonic() - began) / 60, command)
    tables = [("tiny", "gpt2")] if given.quick else TABLES
    write(store, given.out, made, tables)
    console.print(f"written: {given.out / 'benchmarks.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
