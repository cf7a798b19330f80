"""Killed in the middle of each stage, the same command goes on, and nobody can tell afterwards."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.commands import MODELS, TINY, Commands, Outcome, lines, read
from tests.e2e.test_demo import STAGES, stages_that_ran


def trainer_checkpoints(stage: Path) -> list[Path]:
    """Sealed checkpoints of a stage on the transformers Trainer."""
    return [seal.parent for seal in stage.glob("checkpoints/checkpoint-*/complete")]


def policy_checkpoints(stage: Path) -> list[Path]:
    """Checkpoints of the policy stage."""
    return sorted(stage.glob("checkpoints/step-????????"))


MOMENTS: dict[str, Callable[[Path], object]] = {
    "prepare": lambda stage: (stage / "scratch").exists(),
    "pretrain": trainer_checkpoints,
    "sft": trainer_checkpoints,
    "reward": trainer_checkpoints,
    "ppo": lambda stage: len(policy_checkpoints(stage)) >= 2,
    "evaluate": lambda stage: (stage / "begun.json").exists(),
}
"""When to kill: the stage has begun, and has a checkpoint if it writes any."""


@dataclass
class Interrupted:
    """A run killed once in every stage, then finished."""

    out: Path
    last: Outcome
    resumed: dict[str, str] = field(default_factory=dict)
    """By stage, what the call after its kill said."""
    intact: dict[str, bool] = field(default_factory=dict)
    """By stage, whether the call after its kill left the finished stages alone."""


def spoil_trainer(stage: Path) -> None:
    """Leave what a kill in the middle of writing a checkpoint leaves: no seal."""
    half = shutil.copytree(trainer_checkpoints(stage)[0], stage / "checkpoints" / "checkpoint-11")
    (half / "complete").unlink()
    (half / "model.safetensors").write_bytes(b"half")


def spoil_policy(stage: Path) -> None:
    """Truncate the newest checkpoint."""
    newest = policy_checkpoints(stage)[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])


@pytest.fixture(scope="module")
def interrupted(suasion: Commands, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Kill the demo in each stage in turn; after two of the kills, damage a checkpoint."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    found = Interrupted(out, Outcome(1, "", ""))
    killed = ""
    manifests: dict[str, int] = {}
    for stage in (*STAGES, ""):
        running = suasion.start("demo", "--out", out, *TINY)
        if stage:
            outcome = running.stop(signal.SIGKILL, when=partial(MOMENTS[stage], out / stage))
            assert outcome.code == -signal.SIGKILL, outcome
            assert not (out / stage / "manifest.json").exists(), f"{stage} was too fast to kill"
        else:
            found.last = outcome = running.wait()
        if killed:
            found.resumed[killed] = outcome.out
            found.intact[killed] = manifests == written(out, *manifests)
        if stage == "sft":
            spoil_trainer(out / stage)
        if stage == "ppo":
            spoil_policy(out / stage)
        killed = stage
        manifests = written(out, *STAGES[: STAGES.index(stage)] if stage else STAGES)
    return found


def written(out: Path, *stages: str) -> dict[str, int]:
    """When the manifests of stages were written."""
    return {stage: (out / stage / "manifest.json").stat().st_mtime_ns for stage in stages}


def test_the_last_call_succeeds(interrupted: Interrupted) -> None:
    """It has only the evaluation left to do."""
    assert (interrupted.last.code, interrupted.last.err) == (0, "")


@pytest.mark.parametrize("stage", STAGES)
def test_the_call_after_a_kill_goes_on(interrupted: Interrupted, stage: str) -> None:
    """The killed stage is continued, those before it are skipped and not touched."""
    said = stages_that_ran(interrupted.resumed[stage])
    before = STAGES[: STAGES.index(stage)]
    assert {name: said[name] for name in before} == dict.fromkeys(before, "skipped")
    assert said[stage] == "continuing"
    assert interrupted.intact[stage]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_a_run_left_alone(
    demo: Path, interrupted: Interrupted, name: str
) -> None:
    """Byte by byte, in spite of a half-written and a damaged checkpoint."""
    assert (interrupted.out / name).read_bytes() == (demo / name).read_bytes()


def test_figures_are_those_of_a_run_left_alone(demo: Path, interrupted: Interrupted) -> None:
    """All but the time it took; in the summary and in each stage's manifest."""
    once, twice = read(demo / "summary.json"), read(interrupted.out / "summary.json")
    assert once.pop("seconds") > 0
    assert twice.pop("seconds") > 0
    assert once == twice
    for stage in STAGES[:-1]:
        whole, resumed = (read(p / stage / "manifest.json") for p in (demo, interrupted.out))
        assert whole["result"] == resumed["result"], stage


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_metrics_are_those_of_a_run_left_alone(
    demo: Path, interrupted: Interrupted, stage: str
) -> None:
    """No step twice, none missing, the same numbers; times may differ."""

    def figures(run: Path) -> list[dict[str, float]]:
        rows = lines(run / stage / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    assert figures(interrupted.out) == figures(demo)


def test_samples_are_those_of_a_run_left_alone(demo: Path, interrupted: Interrupted) -> None:
    """The fixed prompts' responses, none twice."""
    assert lines(interrupted.out / "ppo/samples.jsonl") == lines(demo / "ppo/samples.jsonl")


def test_a_damaged_checkpoint_is_named_and_passed_over(interrupted: Interrupted) -> None:
    """The one before it is used."""
    assert "is damaged" in interrupted.resumed["ppo"]
    assert "using the one before it" in interrupted.resumed["ppo"]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_ctrl_c_leaves_a_run_that_goes_on(
    demo: Path, suasion: Commands, tmp_path: Path, stage: str
) -> None:
    """Exit code 130, a word on how to go on, and then the same weights."""
    out = shutil.copytree(demo, tmp_path / "a run")
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(out / name)
    command = ("demo", "--out", out, *TINY)
    moment = MOMENTS[stage]
    stopped = suasion.start(*command).stop(signal.SIGINT, when=lambda: moment(out / stage))
    assert stopped.code == 130, stopped
    assert "Traceback" not in stopped.err
    assert f"suasion demo --out '{out}'" in stopped.err
    assert stages_that_ran(suasion.done(*command))[stage] == "continuing"
    for name in MODELS:
        assert (out / name).read_bytes() == (demo / name).read_bytes(), name
