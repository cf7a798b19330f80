"""The whole pipeline: what it leaves, what a second call skips, what a change makes run again."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from suasion.core.summary import Summary
from tests.e2e.commands import MODELS, TINY, Commands, lines, read

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate")


def stages_that_ran(output: str) -> dict[str, str]:
    """The last word each stage said about itself: running, continuing or already done."""
    said = {}
    for line in output.splitlines():
        stage, _, what = line.partition("  ")
        if stage in STAGES and what.split(" ")[0] in ("already", "running", "continuing"):
            said[stage] = "skipped" if what.startswith("already") else what.split(" ")[0]
    return said


def test_every_stage_leaves_a_manifest(demo: Path) -> None:
    """Each names its seed, its inputs and outputs, and the versions that decide numbers."""
    for stage in STAGES:
        manifest = read(demo / stage / "manifest.json")
        assert (manifest["stage"], manifest["status"]) == (stage, "complete")
        assert manifest["seed"] == 1
        assert manifest["outputs"]
        assert {"python", "torch", "transformers"} <= manifest["versions"].keys()
        assert not (demo / stage / "begun.json").exists()
        assert not (demo / stage / "checkpoints").exists()
    assert not list(demo.rglob("*.partial"))


def test_the_summary_has_every_figure(demo: Path) -> None:
    """Each key is there, and is a number: this run has an answer to each."""
    summary = read(demo / "summary.json")
    assert set(summary) == {field.name for field in fields(Summary)}
    assert all(isinstance(value, float) for value in summary.values()), summary
    assert summary["perplexity_after"] < summary["perplexity_before"]


def test_the_page_and_the_resolved_recipe_are_there(demo: Path) -> None:
    """The recipe names every input and can be run as it is."""
    assert (demo / "report" / "index.html").stat().st_size > 1000
    recipe = yaml.safe_load((demo / "recipe.yaml").read_text("utf-8"))
    assert recipe["ppo"]["model"] == str(demo / "sft" / "model")
    assert recipe["ppo"]["steps"] == 4


def test_metrics_of_every_step_are_there(demo: Path) -> None:
    """One line per logged step, in order."""
    assert [row["step"] for row in lines(demo / "ppo/metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in lines(demo / "sft/metrics.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert {row["step"] for row in lines(demo / "ppo/samples.jsonl")} == {0, 2, 4}


def test_the_first_update_starts_where_the_rollout_was(demo: Path) -> None:
    """Before the first step the policy is its own reference and its own sampler."""
    first = lines(demo / "ppo/metrics.jsonl")[0]
    assert abs(first["objective/kl"]) < 1e-3
    assert first["ppo/policy/first_ratio_error"] < 1e-4
    assert first["ppo/policy/first_approxkl"] < 1e-8


def test_a_second_call_skips_every_stage(demo: Path, suasion: Commands, tmp_path: Path) -> None:
    """In a moved folder too: contents count, not paths."""
    copy = shutil.copytree(demo, tmp_path / "moved")
    before = (copy / "summary.json").read_bytes()
    output = suasion.done("demo", "--out", copy, *TINY)
    assert stages_that_ran(output) == dict.fromkeys(STAGES, "skipped")
    assert (copy / "summary.json").read_bytes() == before


def test_a_change_runs_again_what_depends_on_it(
    demo: Path, suasion: Commands, tmp_path: Path
) -> None:
    """And says which key changed."""
    copy = shutil.copytree(demo, tmp_path / "changed")
    output = suasion.done("demo", "--out", copy, *TINY, "--ppo.learning_rate", "3e-4")
    expected = dict.fromkeys(STAGES, "skipped") | {"ppo": "running", "evaluate": "running"}
    assert stages_that_ran(output) == expected
    assert "learning_rate: '0.0001' -> '0.0003'" in output
    assert "after: other content" in output
    for name in MODELS:
        same = (copy / name).read_bytes() == (demo / name).read_bytes()
        assert same == (not name.startswith("ppo/")), name


def test_the_resolved_recipe_runs_to_the_same_state(
    demo: Path, suasion: Commands, tmp_path: Path
) -> None:
    """`run OUT/recipe.yaml` finds everything done."""
    copy = shutil.copytree(demo, tmp_path / "again")
    text = (copy / "recipe.yaml").read_text("utf-8").replace(str(demo), str(copy))
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    output = suasion.done("run", tmp_path / "recipe.yaml")
    assert stages_that_ran(output) == dict.fromkeys(STAGES, "skipped")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_alone_gives_the_bytes_of_the_recipe(
    demo: Path, suasion: Commands, tmp_path: Path, stage: str
) -> None:
    """The same command in another folder: same weights, same figures."""
    recipe = yaml.safe_load((demo / "recipe.yaml").read_text("utf-8"))
    options = [word for pair in flat(recipe[stage]) for word in pair]
    suasion.done(stage, "--out", tmp_path / "alone", "--threads", "1", *options)
    for weights in (demo / stage).rglob("*.safetensors"):
        twin = tmp_path / "alone" / weights.relative_to(demo / stage)
        assert twin.read_bytes() == weights.read_bytes()
    once, twice = (read(folder / "manifest.json") for folder in (demo / stage, tmp_path / "alone"))
    assert once["result"] == twice["result"]
    assert once["fingerprint"] == twice["fingerprint"]


def flat(values: dict[str, object], prefix: str = "--") -> list[tuple[str, str]]:
    """Options as `--key.key value`, but for what is empty."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found += [(f"{prefix}{key}", str(value))] if value else []
        elif value is not None:
            found.append((f"{prefix}{key}", str(value)))
    return found
