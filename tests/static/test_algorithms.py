"""The pages about algorithms name what the code has: metrics, checks, signals."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks.evidence import control, optimum, walks
from benchmarks.evidence.__main__ import compact

from suasion.config.schema import PpoConfig
from suasion.watch.signals import SIGNALS
from suasion.watch.suite import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms" / "ppo.md").read_text(encoding="utf-8")
METRIC = re.compile(r"(?:env|objective|ppo|text|time|tokens)(?:/\w+)+")
SOURCES = ("policy.py", "ppo.py", "ppo_stats.py")


def logged() -> set[str]:
    """Every metric's name that stands in the source of the policy stage."""
    found = set()
    for name in SOURCES:
        source = (ROOT / "src" / "suasion" / "trainers" / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and METRIC.fullmatch(str(node.value)):
                found.add(str(node.value))
    return found


def test_every_metric_is_explained() -> None:
    """Each has a row; what has a row is logged (the time spans' names are put together)."""
    told = set(re.findall(r"^\| `([a-z]+/[\w/]+)` \|", PAGE, re.MULTILINE))
    assert len(logged()) > 30
    assert logged() <= told
    assert all(name.startswith("time/ppo/") for name in told - logged())


def test_every_signal_has_a_symptom() -> None:
    """And every check or signal that the table of symptoms names is there."""
    (table,) = re.findall(r"(?ms)^## Symptoms and causes$(.*?)^## ", PAGE)
    named = set(re.findall(r"`(\w+)`", table))
    signals = {signal.__name__ for signal in SIGNALS}
    assert signals <= named
    assert named <= signals | set(CHECKS)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("random_walks", walks.CONFIG),
        ("optimum", optimum.CONFIG),
        ("adaptive_kl", control.CONFIG),
    ],
    ids=["random_walks", "optimum", "adaptive_kl"],
)
def test_evidence_is_of_this_configuration(name: str, config: PpoConfig) -> None:
    """What docs/evidence shows was made with what the code has, and all of its claims hold."""
    record = json.loads((ROOT / "docs" / "evidence" / f"{name}.json").read_text("utf-8"))
    assert record["config"] == json.loads(json.dumps(asdict(config)))
    assert record["claims"]
    assert all(claim["holds"] for claim in record["claims"])
    page = (ROOT / "docs" / "evidence" / f"{name}.md").read_text("utf-8")
    assert record["made"]["date"] in page


def test_compact_json_is_json() -> None:
    """Lists of numbers on one line; everything else as it was."""
    record = {
        "curve": [1.0, -2.5e-07, None],
        "texts": ["[1,\n 2]", "a"],
        "empty": [],
        "deep": [[1]],
    }
    text = compact(record)
    assert json.loads(text) == record
    assert "[1.0, -2.5e-07, null]" in text
