"""The checks on the command line, and as a part of the policy stage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from suasion.cli.main import main
from suasion.core.files import append_json_line, read_json_lines
from suasion.trainers.ppo import PpoLoop
from tests.unit.watch.conftest import Stage


@pytest.fixture
def recipe(models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A recipe with a policy stage alone, of two small iterations."""
    folder = models("llama")
    values = {
        "name": "tiny",
        "out": str(tmp_path / "run"),
        "ppo": {
            "model": str(folder / "policy"),
            "reward": str(folder / "reward"),
            "data": str(folder / "queries.jsonl"),
            "steps": 2,
            "batch_size": 8,
            "mini_batch_size": 4,
            "epochs": 1,
            "response": {"max_tokens": 12},
            "samples": 2,
            "track": [],
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_check_passes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, a table, and no run folder."""
    assert main(["check", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert "Checks before the run" in told
    assert "FAULT" not in told
    assert not (recipe.parent / "run").exists()


def test_check_finds_a_fault(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 8 and the remedy; 0 where it is only to be told."""
    words = ["check", str(recipe), "--only", "sampler,modes", "--ppo.response.top_k", "5"]
    assert main(words) == 8
    told = capsys.readouterr()
    assert "CheckError: 1 fault that would ruin the run" in told.err
    assert "fix: set response.top_k 0" in told.err
    assert "padding" not in told.out
    assert main([*words, "--ppo.checks", "report"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "modus"], "did you mean modes?"),
        (["--ppo", "null"], "no ppo stage to check"),
        (["--ppo.template", "Q {query} A {response}"], "was trained with the template"),
    ],
)
def test_mistakes(
    recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mistakes of the call keep their own exit codes."""
    assert main(["check", str(recipe), *words]) in (2, 4)
    assert said in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a recipe, and when asked."""
    assert main(["check"]) == main(["check", "--help"]) == 0
    assert "usage: suasion check RECIPE.yaml" in capsys.readouterr().out


def test_policy_stage_stops_before_its_first_step(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left behind but the resolved recipe."""
    run = ["run", str(recipe), "--ppo.response.top_k", "5"]
    assert main(run) == 8
    assert "sampler: top_k 5" in capsys.readouterr().err
    assert not (recipe.parent / "run" / "ppo" / "metrics.jsonl").exists()
    assert main([*run, "--ppo.checks", "off"]) == 0
    assert "checks" not in capsys.readouterr().out


def test_checks_change_nothing(recipe: Path) -> None:
    """A run that was checked is the run that was not."""
    found = {}
    for checks in ("stop", "off"):
        out = recipe.parent / checks
        assert main(["run", str(recipe), "--out", str(out), "--ppo.checks", checks]) == 0
        rows = list(read_json_lines(out / "ppo" / "metrics.jsonl"))
        found[checks] = [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in rows
        ]
    assert len(found["stop"]) == 2
    assert found["stop"] == found["off"]


def test_warnings_are_shown_and_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the metrics, with the step."""
    assert main(["run", str(recipe), "--ppo.learning_rate", "0.5"]) in (0, 6)
    lines = (recipe.parent / "run" / "ppo" / "warnings.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows
    assert set(rows[0]) == {"step", "message"}
    assert f"step {rows[0]['step']}: {rows[0]['message'][:30]}" in capsys.readouterr().out


def test_a_resumed_run_knows_its_past(stage: Stage, tmp_path: Path) -> None:
    """Rows before the checkpoint are seen again, warnings after it are dropped."""
    seen: list[list[float]] = []

    def observe(rows: Sequence[dict[str, float]]) -> list[str]:
        seen.append([row["step"] for row in rows])
        return [f"{len(rows)} so far"]

    def run(steps: int) -> None:
        parts, config = stage(
            steps=steps, batch_size=4, mini_batch_size=4, epochs=1, save_every=1, samples=0
        )
        PpoLoop(
            parts,
            config,
            folder=tmp_path,
            seed=1,
            console=Console(file=io.StringIO()),
            log=lambda *_: None,
            observe=observe,
        ).run()

    run(2)
    append_json_line(tmp_path / "warnings.jsonl", {"step": 3, "message": "of a step cut off"})
    run(3)
    assert seen == [[1], [1, 2], [1, 2, 3]]
    assert list(read_json_lines(tmp_path / "warnings.jsonl")) == [
        {"step": step, "message": f"{step} so far"} for step in (1, 2, 3)
    ]
