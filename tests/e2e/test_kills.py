"""Killed in the middle of a rollout, of an epoch and of a save, a policy run ends as if it had not.

Everything that has a state is on: adapters, momentum, a falling learning rate, an adaptive
coefficient, running moments, sampled lengths.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import Commands, lines
from tests.integration.launch import POLICY, recipe, rows_of, world

STATEFUL: dict[str, Any] = {
    **POLICY,
    "steps": 4,
    "checks": "off",
    "schedule": "cosine",
    "lora": {"r": 2, "targets": ["q_proj", "v_proj"], "merge": False},
    "critic": {"kind": "policy_copy", "warmup": 1},
    "kl": {"coef": 0.1, "horizon": 20.0, "target": 0.5},
}
STEPS = 3 * 2
"""Optimizer steps of an iteration: mini-batches times epochs."""
TOKENS = STATEFUL["response"]["max_tokens"]
MOMENTS = {
    # Fixed prompts are answered before the first iteration and after each: this is in the second.
    "rollout": [f"rollout:{3 * TOKENS + 2}"],
    "epoch": [f"epoch:{STEPS + 4}"],
    "save": ["save:3"],
    # Each counts from where the kill before it left the run.
    "all": [f"rollout:{3 * TOKENS + 2}", f"epoch:{STEPS + 4}", "save:1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and a reward."""
    return world(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def whole(suasion: Commands, place: Path) -> Path:
    """The stage of a run left alone."""
    suasion.done("run", recipe(place, "whole", ppo=STATEFUL))
    return place / "whole" / "ppo"


def everything(stage: Path) -> dict[str, Any]:
    """Weights byte by byte, figures and samples."""
    found: dict[str, Any] = {
        str(path.relative_to(stage)): path.read_bytes()
        for path in sorted(stage.rglob("*.safetensors"))
    }
    for name in ("metrics.jsonl", "samples.jsonl"):
        found[name] = rows_of(stage / name)
    return found


@pytest.mark.parametrize("where", MOMENTS)
def test_k_steps_a_kill_and_the_rest_are_n_steps(
    suasion: Commands, place: Path, whole: Path, where: str
) -> None:
    """Bit for bit, whatever was going on, and also if it happens again and again."""
    path = recipe(place, where, ppo=STATEFUL)
    stage = place / where / "ppo"
    for moment in MOMENTS[where]:
        killed = suasion.run("run", path, kill=moment)
        assert killed.code == -signal.SIGKILL, killed
        done = len(lines(stage / "metrics.jsonl"))
        assert 0 < done < STATEFUL["steps"], done
        saved = sorted(stage.glob("checkpoints/step-*"))
        assert saved, "the next call has something to go on from"
        if moment.startswith("save"):
            assert "partial" in saved[-1].name, "killed before the checkpoint was whole"
    assert "continuing" in suasion.done("run", path)
    once, again = everything(whole), everything(stage)
    assert once.keys() == again.keys()
    assert len(once) >= 4, "adapter, critic, metrics and samples"
    for name, content in once.items():
        assert again[name] == content, name


def test_the_state_matters(whole: Path) -> None:
    """Negative control: in this run learning rate, coefficient and scores' scale do move."""
    rows = rows_of(whole / "metrics.jsonl")
    for name in ("ppo/learning_rate", "objective/kl_coef", "ppo/policy/approxkl"):
        assert len({row[name] for row in rows}) > 2, name
