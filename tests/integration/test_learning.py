"""The policy stage learns, and learns what it is told to: short forms of `make evidence`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.evidence import control, optimum, walks

from suasion.config.schema import KlConfig

PAGE = Path(__file__).parents[2] / "docs" / "algorithms" / "ppo.md"

# The graph of trlX's PPO example (seed 1000), found by an independent program that draws the same
# numbers: nodes after each node, nodes of the shortest walk from nodes 1 to 20, what the thousand
# walks are worth, and the first three of them.
EDGES = [
    [0], [3, 9, 20], [4, 10, 14, 17], [0, 11, 19], [1, 18], [3, 7, 8, 12], [2, 16, 17, 20], [2],
    [3, 7], [13], [1, 6, 9, 13], [1], [1, 4, 5, 6, 7, 18], [0, 1], [17], [9, 20], [5, 9],
    [6, 9, 14], [3, 20], [10], [1, 8, 18],
]  # fmt: skip
SHORTEST = [3, 4, 2, 4, 3, 5, 5, 3, 3, 3, 4, 4, 2, 5, 4, 4, 4, 3, 4, 4]
WORTH = 0.3515095238095238
FIRST = [(18, 3, 0), (5, 3, 0), (4, 1, 9, 13, 1, 3, 19, 10, 13, 0)]


@pytest.fixture(scope="module")
def cloned() -> Any:
    """A model cloned from the walks."""
    return walks.clone(seed=1, steps=200)


def walk_for(model: Any, steps: int, **changes: Any) -> list[dict[str, float]]:
    """The evidence's stage, cut short."""
    return walks.learn(model, replace(walks.CONFIG, steps=steps, **changes), seed=1)


def test_the_graph_is_the_known_one() -> None:
    """Edge for edge and walk for walk; another seed is another graph (negative control)."""
    world = walks.graph()
    assert [list(after) for after in world.edges] == EDGES
    assert list(world.shortest[1:]) == SHORTEST
    assert list(world.walks[:3]) == FIRST
    worth = [walks.optimality(walk, world) for walk in world.walks]
    assert sum(worth) / len(worth) == pytest.approx(WORTH, abs=1e-12)
    assert [list(after) for after in walks.graph(1002).edges] != EDGES


@pytest.mark.parametrize(
    ("walk", "worth"),
    [
        ([1, 3, 0], 1.0),
        ([1, 3, 0, 17, 5], 1.0),
        ([1, 9, 13, 0], 6 / 7),
        ([1, 2, 0], 0.0),
        ([1, 3], 0.0),
        ([1], 0.0),
        ([9, 13, 1, 9, 13, 1, 9, 13, 1, 3, 0], 0.0),
    ],
    ids=["shortest", "what follows is not read", "longer", "no edge", "cut", "nothing", "too long"],
)
def test_what_a_walk_is_worth(walk: Sequence[int], worth: float) -> None:
    """By hand, from the edges above."""
    assert walks.optimality(walk, walks.graph()) == pytest.approx(worth, abs=1e-12)


def test_walks_become_shorter(cloned: Any) -> None:
    """From what the cloned walks are worth to far above, in six iterations of 128 walks."""
    rows = walk_for(cloned, 6)
    assert rows[0]["optimality"] == pytest.approx(WORTH, abs=0.05)
    assert rows[-1]["optimality"] > 0.75
    assert all(row["ppo/policy/first_approxkl"] < 1e-9 for row in rows[1:])


def test_the_opposite_reward_makes_them_worse(cloned: Any) -> None:
    """Negative control: it is the reward that teaches, not the training."""
    rows = walk_for(cloned, 3, reward="benchmarks.evidence.walks:flipped")
    assert rows[-1]["optimality"] < rows[0]["optimality"] - 0.15


def test_every_metric_is_explained(cloned: Any) -> None:
    """docs/algorithms/ppo.md has a row for each figure an iteration gives, and no other."""
    (row,) = walk_for(cloned, 1)[1:]
    told = re.findall(r"^\| `([a-z]+/[\w/]+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted(told) == sorted(set(row) - {"step", "optimality"})


def test_the_coefficient_finds_its_target() -> None:
    """The KL settles; with a small coefficient that stays it does not (negative control)."""
    rows = control.learn(replace(control.CONFIG, steps=70), seed=1)
    target = control.CONFIG.kl.target
    assert control.settled(rows) == pytest.approx(target, rel=0.2)
    coefs = [row["objective/kl_coef"] for row in rows]
    assert min(coefs) < 0.9 * coefs[0]
    assert coefs[-1] > 1.05 * min(coefs)
    loose = replace(control.CONFIG, steps=40, kl=KlConfig(coef=0.01, adaptive=False))
    assert control.learn(loose, seed=1)[-1]["objective/kl"] > 1.5 * target


def test_the_optimum_is_approached() -> None:
    """Most of the way to beta log Z in twenty iterations, and never above it."""
    rows, best = optimum.learn(replace(optimum.CONFIG, steps=20), seed=1)
    gaps = [best - row["objective"] for row in rows]
    assert gaps[0] > 0.3
    assert min(gaps) > -1e-6
    assert gaps[-1] < 0.03
