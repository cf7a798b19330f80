"""The summary survives the disk, refuses what it does not know, and shows only what it has."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from rich.console import Console

from suasion.core.errors import DataError
from suasion.core.summary import Summary, summary_table

FULL = Summary(
    **{field.name: 0.11 * number for number, field in enumerate(fields(Summary), start=1)}
)


def shown(summary: Summary) -> str:
    """The table as a terminal shows it."""
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary_table(summary))
    return captured.get()


@pytest.mark.parametrize("summary", [FULL, Summary(), Summary(kl=-0.3)])
def test_read_returns_what_was_written(tmp_path: Path, summary: Summary) -> None:
    """Full, empty and partial records."""
    path = tmp_path / "summary.json"
    summary.write(path)
    assert Summary.read(path) == summary
    assert json.loads(path.read_text()) == asdict(summary)


def test_a_diverged_figure_becomes_null(tmp_path: Path) -> None:
    """NaN and infinity have no place in JSON."""
    path = tmp_path / "summary.json"
    Summary(kl=math.nan, score_ppo=math.inf, seconds=3.0).write(path)
    assert Summary.read(path) == Summary(seconds=3.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"kl": "low"}', "kl is 'low'"),
        ('{"kl": true}', "kl is True"),
        ('{"gold": 1}', "unknown key 'gold'"),
        ("[]", "not a JSON object"),
        ("{", "line 1"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    """The message names the key or the line."""
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(DataError, match=named):
        Summary.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message has the path."""
    with pytest.raises(DataError, match=r"summary\.json"):
        Summary.read(tmp_path / "summary.json")


def test_the_table_rounds_and_hides() -> None:
    """Rounded figures, and no row without one."""
    summary = Summary(
        perplexity_before=71.238,
        perplexity_after=24.31,
        win_rate=0.6328,
        win_rate_low=0.551,
        win_rate_high=0.713,
        seconds=754.4,
    )
    table = shown(summary)
    assert "71.24" in table
    assert "63.3%" in table
    assert "55.1% to 71.3%" in table
    assert "12 min 34 s" in table
    assert "gold" not in table
    assert "KL" not in table
    assert "gold" in shown(FULL)


def test_an_empty_summary_has_no_rows() -> None:
    """Nothing known, nothing shown."""
    assert summary_table(Summary()).row_count == 0
