"""Two processes under a launcher do what one does, and go on after a kill as one does.

Real processes, started by torchrun, talking through gloo; each test says how many there were.
"""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from suasion.cli.main import main
from suasion.core.files import file_hash
from tests.integration.launch import (
    POLICY,
    TRAINER,
    launch,
    manifest_of,
    recipe,
    rows_of,
    weights_of,
    world,
)

pytestmark = pytest.mark.dist

FRESH = {"vocabulary": 270, "hidden_size": 32, "layers": 2, "heads": 2, "context": 48}
TEXT = {**TRAINER, "max_steps": 3, "fresh": FRESH}
JUDGE = {name: value for name, value in TRAINER.items() if name != "block"}
CALM: dict[str, Any] = {**POLICY, "learning_rate": 3e-4}
"""Ratios near 1, so that rounding stays small."""
STAGES = ("pretrain", "sft", "reward", "ppo")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and a reward."""
    return world(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def two(place: Path) -> CompletedProcess[str]:
    """A recipe run by two processes, into `two`."""
    path = recipe(place, "two", pretrain=TEXT, sft=TRAINER, reward=JUDGE, ppo=CALM)
    return launch(2, "run", path)


@pytest.fixture(scope="module")
def one(place: Path) -> Path:
    """The same by one, whose batches are those of the two together."""
    doubled = {"batch_size": 2 * TRAINER["batch_size"]}
    path = recipe(
        place,
        "one",
        pretrain={**TEXT, **doubled},
        sft={**TRAINER, **doubled},
        reward={**JUDGE, **doubled},
        ppo=CALM,
    )
    assert main(["run", str(path)]) == 0
    return place / "one"


def test_it_was_two_processes_that_ran(two: CompletedProcess[str]) -> None:
    """Three ways to start them end in silence with one each; this one did not."""
    assert two.returncode == 0, two.stderr
    assert two.stdout.startswith("2 processes\n")
    for stage in STAGES:
        assert two.stdout.count(f"{stage}  running") == 1, "said once"


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(
    place: Path, two: CompletedProcess[str], one: Path, stage: str
) -> None:
    """Figures and final weights up to the order of sums; a fresh model is made once.

    In ppo one process has no row of the last mini-batch, and in the first iteration only the critic
    learns: what has no gradient in either process must be left alone in both.
    """
    assert two.returncode == 0, two.stderr
    rows = [rows_of(run / stage / "metrics.jsonl") for run in (one, place / "two")]
    assert len(rows[0]) == len(rows[1]) > 2
    for row, other in zip(*rows, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    first, second = weights_of(one / stage), weights_of(place / "two" / stage)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=3e-6, rtol=1e-5, msg=name)
    start = weights_of(one / "pretrain" / "start" if stage == "pretrain" else place / "model")
    moved = [
        float((tensor - start[key]).abs().max())
        for name, tensor in first.items()
        if (key := name.removeprefix("model/")) in start
    ]
    assert max(moved) > 3e-4, "it trained at all"


def test_samples_are_the_same(place: Path, two: CompletedProcess[str], one: Path) -> None:
    """Token by token: each row has random numbers of its own."""
    assert two.returncode == 0, two.stderr
    found = rows_of(place / "two" / "ppo" / "samples.jsonl")
    expected = rows_of(one / "ppo" / "samples.jsonl")
    assert len(found) == 4 * CALM["samples"]
    for row, other in zip(found, expected, strict=True):
        assert row.pop("score") == pytest.approx(other.pop("score"))
        assert row == other


def test_files_are_written_once(place: Path, two: CompletedProcess[str]) -> None:
    """The manifests hold, and running again finds all done, in one process or in two."""
    assert two.returncode == 0, two.stderr
    for stage in STAGES:
        folder = place / "two" / stage
        outputs = manifest_of(folder)["outputs"]
        assert outputs
        for name, digest in outputs.items():
            assert file_hash(folder / name) == digest, name
    before = (place / "two" / "ppo" / "manifest.json").stat().st_mtime_ns
    assert main(["run", str(place / "two.yaml")]) == 0
    assert (place / "two" / "ppo" / "manifest.json").stat().st_mtime_ns == before


def test_a_kill_and_an_error_of_one_process(place: Path, two: CompletedProcess[str]) -> None:
    """Both stop; the message comes once; the next call ends as if nothing had been.

    Killed: the second process, in the middle of a step of sft. Failed: its reward, in the middle of
    an iteration of ppo.
    """
    assert two.returncode == 0, two.stderr
    stages: dict[str, Any] = {"sft": TRAINER, "ppo": CALM}
    path = recipe(place, "cut", **stages)
    killed = launch(2, "run", path, SUASION_TEST_KILL="fit:4", SUASION_TEST_RANK="1")
    assert killed.returncode != 0
    assert not (place / "cut" / "sft" / "manifest.json").exists()
    refused = launch(2, "run", path, SUASION_TEST_REFUSE="1:4")
    assert refused.returncode != 0
    assert refused.stdout.count("sft  continuing") == 1
    assert refused.stderr.count("RewardError: reward ") == 1, refused.stderr
    assert "ValueError: no such answer" in refused.stderr
    assert "src/suasion" not in refused.stderr, "the launcher has a traceback of its own, we none"
    assert len(rows_of(place / "cut" / "ppo" / "metrics.jsonl")) == 1
    finished = launch(2, "run", path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("ppo  continuing") == 1
    for stage in stages:
        whole, again = (place / run / stage for run in ("two", "cut"))
        assert rows_of(again / "metrics.jsonl") == rows_of(whole / "metrics.jsonl")
        first, second = weights_of(whole), weights_of(again)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), name
