"""The benchmark of 20 billion parameters, on a shape that fits a test."""

from __future__ import annotations

import io
import mmap
from pathlib import Path

import torch
from benchmarks.gpu.neox20b import Meter, run, table
from rich.console import Console

from suasion.core.files import read_json_lines
from suasion.models.quantised import quantised_layers


def test_every_phase_runs_on_one_int8_base(tmp_path: Path) -> None:
    """The three steps, by suasion's own stages, and a row for each."""
    console = Console(file=io.StringIO())
    base, phases, before = run("tiny", tmp_path, console=console)
    assert [phase.name for phase in phases] == ["base made", "sft", "merge", "reward", "ppo"]
    assert len(quantised_layers(base)) == 8
    learns = {phase.name: phase.learns for phase in phases}
    # Policy and critic learn in the last phase, the reward model is the adapter that does not.
    assert learns["ppo"] == 2 * learns["sft"]
    assert 4 * phases[-1].adapters == learns["sft"]
    (row,) = read_json_lines(tmp_path / "ppo" / "metrics.jsonl")
    assert abs(row["objective/kl"]) < 0.05
    shown, record = table(base, phases, before)
    assert shown.row_count == 5
    assert set(record["phases"]) == set(learns)


def test_a_phase_is_charged_with_what_it_held_for_a_moment() -> None:
    """Freed at the end of its phase, and not in the peak of the next."""
    size, page = 128 << 20, 4096
    meter = Meter(torch.device("cpu"), torch.nn.Linear(1, 1))
    # Past the C library, which may keep what is freed.
    with meter.phase("holds", learn=0, idle=0), mmap.mmap(-1, size) as held:
        for at in range(0, size, page):
            held[at] = 1
    with meter.phase("does not", learn=0, idle=0):
        pass
    holds, rests = meter.phases
    assert holds.peak - rests.peak > size / 2
