"""The benchmarks run: ours on a model of nothing, and the GPU script on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.speed import where
from benchmarks.speed.__main__ import main
from benchmarks.speed.floor import floor_of
from benchmarks.speed.task import Task

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory and load are read from /proc")
def test_dry_run(tmp_path: Path) -> None:
    """Every kind of work is done on our side, and every reading is whole."""
    out, scratch = tmp_path / "docs", tmp_path / "scratch"
    assert main(["--quick", "--out", str(out), "--scratch", str(scratch)]) == 0
    made, rates, *rows = json.loads((out / "benchmarks" / "readings.json").read_text("utf-8"))
    assert made["made"]["command"].startswith("make bench")
    tasks = [Task.parse(row["task"]) for row in rows]
    assert {task.work for task in tasks} == {"ppo", "rollout", "sft", "reward"}
    assert {task.system for task in tasks} == {"ours", "generate"}
    for task, row in zip(tasks, rows, strict=True):
        assert "error" not in row
        counted = [reading for reading in row["readings"] if reading["iteration"] > 0]
        assert counted
        for reading in counted:
            assert sum(reading["phases"].values()) == pytest.approx(reading["seconds"])
            assert min(reading["phases"].values()) >= 0
            assert 0 < reading["tokens"] <= reading["positions"]
            assert reading["peak_bytes"] > 0
            least = floor_of(task, reading, rates["rates"], "fp32")
            assert 0 < sum(least.values()) < reading["seconds"]
    text = (out / "benchmarks.md").read_text("utf-8")
    assert "## GPT-2 tiny" in text


def test_gpu_script_dry(tmp_path: Path) -> None:
    """Right before fast; the table comes last and is written where OUT says."""
    done = subprocess.run(  # noqa: S603 (our own script)
        [str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--dry"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("| dry | supervised step |")
    record = json.loads((tmp_path / "benchmarks-gpu.json").read_text("utf-8"))
    assert len(record["checks"]) == 14
    assert all(line.startswith("right") for line in record["checks"])
    assert len(record["rows"]) == 6
    assert (tmp_path / "benchmarks-gpu.md").read_text("utf-8").strip().endswith(last)


def test_gpu_script_says_what_is_missing(tmp_path: Path) -> None:
    """An interpreter without the libraries is told which ones it needs."""
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -s "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = subprocess.run(  # noqa: S603 (our own script)
        [str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--dry"],
        env={**os.environ, "PYTHON": str(bare)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout.startswith("missing: torch, transformers")


def test_where_the_seconds_go(tmp_path: Path) -> None:
    """A line of the table from a profiled process; its shares are of the whole."""
    task = Task("profiled", work="rollout", shape="tiny", batch=2, response=4, iterations=3)
    rates = {"copy_bytes_per_second": 1e10, "fp32 flops": 1e11, "fp32 error": 1e-7}
    name, seconds, floor, *cells = where.row(task, tmp_path, rates)
    assert name.startswith("work=rollout shape=tiny")
    assert float(seconds) > float(floor)
    assert sum(float(cell.rstrip("%")) for cell in cells) == pytest.approx(100, abs=len(cells))
    assert float(cells[0].rstrip("%")) > 0
