"""Random walks: shortest paths through a graph, learnt from what a walk is worth.

The task of CarperAI/trlx@3340c2f3 examples/randomwalks/randomwalks.py, on the graph that its PPO
example trains on (seed 1000). The prompt is a node, the response the nodes that follow; walks end
at node 0. A walk is worth 1 if no shorter one exists and 0 if it leaves the graph or does not
arrive within `LONGEST` nodes. Cloned from random walks, a policy starts at what these are worth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.stage import BARE, TEMPLATE, curve_of, stage_of, tiny_model, word_codec
from suasion.config.schema import CriticConfig, KlConfig, PpoConfig, ResponseConfig
from suasion.core.records import token_batch
from suasion.core.seeding import generator, seed_of
from suasion.data.codec import Codec
from suasion.models.roles import Policy
from suasion.trainers.ppo import PpoLoop, roll_out

NODES = 21
LONGEST = 10
"""Nodes of the longest walk, its start included."""
WALKS = 1000
EDGES = 0.1
"""Probability of an edge."""
SEED = 1000
EVALUATED = 32
"""Walks per start node whose mean is a point of the curve."""

CONFIG = PpoConfig(
    reward="benchmarks.evidence.walks:reward",
    template=TEMPLATE,
    steps=40,
    batch_size=128,
    mini_batch_size=32,
    epochs=4,
    learning_rate=1e-4,
    schedule="linear",
    kl=KlConfig(coef=0.01, adaptive=False),
    # A token per node and one to end with.
    response=ResponseConfig(max_tokens=LONGEST),
    critic=CriticConfig(coef=1.0),
    **BARE,
)


@dataclass(frozen=True)
class Graph:
    """A graph, walks through it, and how short the shortest are."""

    edges: tuple[tuple[int, ...], ...]
    """Nodes that can follow each node."""
    walks: tuple[tuple[int, ...], ...]
    """Random walks from random starts, until node 0 or `LONGEST` nodes."""
    shortest: tuple[int, ...]
    """Nodes of the shortest walk from each node to node 0, at most `LONGEST`."""


@cache
def graph(seed: int = SEED) -> Graph:
    """Draw a graph and walks as trlX draws them, number for number.

    numpy's `RandomState` gives the same stream in every version, so the graph is the known one.
    """
    draws = np.random.RandomState(seed)
    while True:
        joined = draws.rand(NODES, NODES) > 1 - EDGES
        np.fill_diagonal(joined, val=False)
        if joined.any(axis=1).all():
            break
    following = [tuple(int(node) for node in np.flatnonzero(row)) for row in joined]
    following[0] = (0,)
    walks = []
    for _ in range(WALKS):
        walk = [0]
        while walk[0] == 0:
            walk = [int(draws.randint(NODES))]
        while walk[-1] != 0 and len(walk) < LONGEST:
            walk.append(int(draws.choice(following[walk[-1]])))
        walks.append(tuple(walk))
    return Graph(tuple(following), tuple(walks), _distances(following))


def _distances(following: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Breadth first, backwards from node 0."""
    found = {0: 1}
    waiting = deque([0])
    while waiting:
        node = waiting.popleft()
        for before in range(NODES):
            if node in following[before] and before not in found:
                found[before] = found[node] + 1
                waiting.append(before)
    return tuple(min(found.get(node, LONGEST), LONGEST) for node in range(NODES))


def optimality(walk: Sequence[int], world: Graph) -> float:
    """What a walk is worth, 0 to 1.

    `(LONGEST - nodes) / (LONGEST - fewest possible nodes)` if it arrives at node 0 along edges,
    else 0. What comes after node 0 does not count.
    """
    for place, (node, after) in enumerate(pairwise(walk), start=2):
        if place > LONGEST or after not in world.edges[node]:
            return 0.0
        if after == 0:
            return (LONGEST - place) / (LONGEST - world.shortest[walk[0]])
    return 0.0


def reward(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What each walk is worth; the texts are node numbers."""
    rows = zip(queries, responses, strict=True)
    return [optimality([int(n) for n in f"{q} {r}".split()], graph()) for q, r in rows]


def flipped(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The opposite reward, for the negative control."""
    return [-score for score in reward(queries, responses)]


def words() -> Codec:
    """One token per node."""
    return word_codec([str(node) for node in range(NODES)])


def clone(*, seed: int, steps: int = 400, rows: int = 100) -> Any:
    """A model trained on the walks as text.

    Args:
        seed: Of its weights and of the order of the walks.
        steps: Optimizer steps.
        rows: Walks per step.
    """
    codec = words()
    model = tiny_model(codec, context=16, width=64, layers=2, seed=seed_of(seed, "weights") % 2**32)
    policy = Policy(model, 1.0)
    starts, rests = [], []
    for walk in graph().walks:
        starts.append(codec.prompt_ids(str(walk[0])))
        text = " ".join(str(node) for node in walk[1:])
        rests.append(codec.response_ids(text, ended=walk[-1] == 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    draws = generator(seed, "cloning")
    for _ in range(steps):
        chosen = torch.randint(len(starts), (rows,), generator=draws).tolist()
        batch = token_batch([starts[i] for i in chosen], [rests[i] for i in chosen], codec.pad_id)
        optimizer.zero_grad()
        (-policy.logprobs(batch)[0].mean()).backward()
        optimizer.step()
        schedule.step()
    return model


def mean_optimality(loop: PpoLoop) -> dict[str, float]:
    """The policy's mean over equally many walks from each start, the same random numbers always."""
    queries = [query for query in sorted(loop.parts.queries) for _ in range(EVALUATED)]
    rollout = roll_out(loop.parts, loop.config.response, queries, loop.seed, ("evidence", 0))
    texts = [loop.parts.codec.text_of(ids) for ids in rollout.responses]
    return {"optimality": sum(reward(queries, texts)) / len(queries)}


def learn(model: Any, config: PpoConfig = CONFIG, *, seed: int) -> list[dict[str, float]]:
    """Train; rows as of `curve_of` with `optimality`.

    Args:
        model: What `clone` made; it stays as it is.
        config: Of the policy stage.
        seed: Of the stage.
    """
    queries = [str(node) for node in range(1, NODES)]
    with stage_of(model, words(), queries, config, seed=seed) as loop:
        return curve_of(loop, mean_optimality)


def reached(rows: Sequence[dict[str, float]], level: float) -> int | None:
    """First iteration after which the curve is at `level` or above, if any is."""
    return next((int(row["step"]) for row in rows if row["optimality"] >= level), None)
