"""Make the evidence again and write it down: `make evidence`, or one part of it by name.

    python -m benchmarks.evidence [random_walks] [bf16] [optimum] [adaptive_kl]

Each part leaves NAME.json (every figure and how it was made), NAME.md and NAME.svg in
docs/evidence. A claim that does not hold ends the command with exit code 1, after everything is
written.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.evidence.parts import PARTS, Evidence, Rows
from suasion.core.files import write_text

FOLDER = Path(__file__).parents[2] / "docs" / "evidence"
KEPT = (
    "step",
    "optimality",
    "objective",
    "reward",
    "kl",
    "env/reward_mean",
    "objective/kl",
    "objective/kl_coef",
    "ppo/policy/approxkl",
    "ppo/policy/clipfrac",
    "ppo/val/var_explained",
    "tokens/responses_len_mean",
)
"""What is kept of each iteration, where it is there."""


def made_with(when: datetime, seconds: float) -> dict[str, Any]:
    """Where and how figures came about."""
    packages = ("suasion", "torch", "transformers", "numpy")
    return {
        "date": when.date().isoformat(),
        "command": "make evidence",
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread",
    }


def page(name: str, evidence: Evidence, made: dict[str, Any]) -> str:
    """The part as Markdown; the figures in it are those of this run."""
    rule = tuple("---" for _ in evidence.header)
    rows = ["| " + " | ".join(cells) + " |" for cells in (evidence.header, rule, *evidence.table)]
    kept = [f"- {'holds' if c.holds else '**does not hold**'}: {c.what}" for c in evidence.claims]
    versions = ", ".join(f"{key} {value}" for key, value in made.items() if key != "command")
    return "\n".join(
        [
            f"# {evidence.title}",
            "",
            textwrap.fill(evidence.about, 100),
            "",
            f"![{evidence.title}]({name}.svg)",
            "",
            *rows,
            "",
            *kept,
            "",
            textwrap.fill(f"Written by `{made['command']}`: {versions}.", 100),
            f"Every iteration and the whole configuration: [{name}.json]({name}.json).",
            "",
        ]
    )


def compact(record: dict[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line, so that a curve is a line of a diff."""
    text = json.dumps(record, indent=2, allow_nan=False)
    return re.sub(r"\[([-+.,\s\deEnul]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def main(names: Sequence[str]) -> int:
    """Make the named parts, or all; 1 if a claim does not hold."""
    console = Console(highlight=False)
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        console.print(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return 2
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # too small to share
    held = True
    for name in names or PARTS:
        began = time.perf_counter()
        evidence = PARTS[name]()
        made = made_with(datetime.now(UTC), time.perf_counter() - began)
        kept = {
            seed: [{key: row[key] for key in KEPT if key in row} for row in rows]
            for seed, rows in evidence.curves.items()
        }
        record = {
            "title": evidence.title,
            "made": made,
            "claims": [asdict(claim) for claim in evidence.claims],
            **evidence.figures,
            "config": asdict(evidence.config),
            "curves": {seed: _columns(rows) for seed, rows in kept.items()},
        }
        write_text(FOLDER / f"{name}.json", compact(record))
        write_text(FOLDER / f"{name}.svg", evidence.drawing)
        write_text(FOLDER / f"{name}.md", page(name, evidence, made))
        console.print(f"{evidence.title}: {made['seconds']} s")
        for claim in evidence.claims:
            console.print(f"  {'holds ' if claim.holds else 'FAILS '} {claim.what}")
            held = held and claim.holds
    return 0 if held else 1


def _columns(rows: Rows) -> dict[str, list[float | None]]:
    """Four digits of each figure, by name; None where the first row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: [float(f"{row[name]:.4g}") if name in row else None for row in rows] for name in names
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
