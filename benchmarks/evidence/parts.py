"""The parts of the evidence: what is run, what it has to show, and the table and drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.evidence import control, optimum, walks
from benchmarks.evidence.drawing import Curve, Level, drawing
from suasion.config.schema import PpoConfig

SEEDS = (1, 2, 3)
OPTIMALITY = 0.9
"""Mean optimality that each seed must reach."""
START = 0.05
"""How far the cloned policy may be from the walks it was cloned from."""
GAP = 0.005
"""How far below BETA log Z the objective may end, reward units."""
SETTLED = 0.2
"""How far the settled KL may be from its target, as a share of it."""
Rows = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Claim:
    """What was to be shown, and whether it was."""

    what: str
    holds: bool


@dataclass(frozen=True)
class Evidence:
    """One part, ready to be written."""

    title: str
    about: str
    """A paragraph for the page."""
    config: PpoConfig
    claims: list[Claim]
    header: tuple[str, ...]
    table: Sequence[tuple[str, ...]]
    figures: dict[str, Any]
    curves: Mapping[str, Rows]
    """Rows of each seed."""
    drawing: str


def random_walks() -> Evidence:
    """Cloned from random walks, the policy learns to take short ones."""
    world = walks.graph()
    cloned = sum(walks.optimality(walk, world) for walk in world.walks) / len(world.walks)
    curves = {str(s): walks.learn(walks.clone(seed=s), seed=s) for s in SEEDS}
    claims, table, reached = [], [], {}
    for seed, rows in curves.items():
        start, end = rows[0]["optimality"], rows[-1]["optimality"]
        at = reached[seed] = walks.reached(rows, OPTIMALITY)
        claims.append(
            Claim(f"seed {seed} starts within {START} of the walks", abs(start - cloned) <= START)
        )
        claims.append(
            Claim(
                f"seed {seed} reaches {OPTIMALITY} and ends above it",
                at is not None and end >= OPTIMALITY,
            )
        )
        kl = f"{rows[-1]['objective/kl']:.2f}"
        table.append((seed, f"{start:.3f}", str(at), f"{end:.3f}", kl))
    svg = drawing(
        "Mean optimality of walks",
        [Curve(f"seed {s}", [row["optimality"] for row in rows]) for s, rows in curves.items()],
        [Level("the walks it was cloned from", cloned), Level(str(OPTIMALITY), OPTIMALITY)],
        unit="1 = no shorter walk exists",
    )
    return Evidence(
        "Random walks",
        f"A graph of {walks.NODES} nodes; the policy is given a node and writes the ones that "
        "follow, and a walk to node 0 is worth the more the shorter it is. A GPT-2 of two layers "
        f"was cloned from {walks.WALKS} random walks, which are worth {cloned:.4f} on average, and "
        f"then trained by PPO on {walks.CONFIG.batch_size} walks per iteration. Points are means "
        f"over {walks.EVALUATED} walks from each start, sampled with the same random numbers "
        "every time. Task and graph: CarperAI/trlx@3340c2f3 examples/randomwalks/randomwalks.py.",
        walks.CONFIG,
        claims,
        ("seed", "at the start", f"iteration reaching {OPTIMALITY}", "at the end", "KL, nats"),
        table,
        {"walks": cloned, "reached": reached},
        curves,
        svg,
    )


def half_precision() -> Evidence:
    """In bf16 the same walks are learnt as in fp32, as far as one seed is like another."""
    models = {seed: walks.clone(seed=seed) for seed in SEEDS}
    curves, ends, means = {}, {}, {}
    for precision in ("fp32", "bf16"):
        config = replace(walks.CONFIG, precision=precision)
        for seed in SEEDS:
            rows = walks.learn(models[seed], config, seed=seed)
            name = f"{precision}, seed {seed}"
            curves[name], ends[name] = rows, rows[-1]["optimality"]
            means[name] = fmean(row["optimality"] for row in rows)
    claims = []
    for what, values in (("at the end", ends), ("over the whole curve", means)):
        wide, half = ([values[f"{p}, seed {s}"] for s in SEEDS] for p in ("fp32", "bf16"))
        spread, apart = max(wide) - min(wide), abs(fmean(half) - fmean(wide))
        claims.append(
            Claim(
                f"{what} the means of the seeds differ by {apart:.4f}, seeds in fp32 by "
                f"{spread:.4f}",
                apart <= spread,
            )
        )
    error = "ppo/policy/first_ratio_error"
    table = [
        (name, f"{rows[0]['optimality']:.3f}", str(walks.reached(rows, OPTIMALITY)),
         f"{means[name]:.3f}", f"{ends[name]:.3f}", f"{max(row[error] for row in rows[1:]):.1e}")
        for name, rows in curves.items()
    ]  # fmt: skip
    fp32, bf16 = (
        _at_each([curves[f"{precision}, seed {seed}"] for seed in SEEDS])
        for precision in ("fp32", "bf16")
    )
    svg = drawing(
        "Mean optimality of walks",
        [
            Curve("fp32, mean", [fmean(values) for values in fp32]),
            Curve("bf16, mean", [fmean(values) for values in bf16]),
            Curve("fp32, lowest", [min(values) for values in fp32]),
            Curve("fp32, highest", [max(values) for values in fp32]),
        ],
        [Level(str(OPTIMALITY), OPTIMALITY)],
        unit="1 = no shorter walk exists",
    )
    return Evidence(
        "Learning in bf16",
        "The random walks again, by the same cloned models: in fp32, and in bf16 as a processor or "
        "card with fast bf16 does it (products in bf16; weights, optimizer and softmax in fp32). "
        "The last column is how far the probability ratio is from 1 before the first step of an "
        "iteration, at most: the rounding between decoding and the update.",
        replace(walks.CONFIG, precision="bf16"),
        claims,
        ("run", "at the start", f"iteration reaching {OPTIMALITY}", "mean of the curve",
         "at the end", "first ratio"),
        table,
        {"ends": ends, "means": means},
        curves,
        svg,
    )  # fmt: skip


def _at_each(runs: Sequence[Rows]) -> list[list[float]]:
    """Optimality of all runs, iteration by iteration."""
    return [[row["optimality"] for row in rows] for rows in zip(*runs, strict=True)]


def closed_form() -> Evidence:
    """The loop ends at the optimum that is known."""
    found = {str(seed): optimum.learn(seed=seed) for seed in SEEDS}
    gaps = {s: [best - row["objective"] for row in rows] for s, (rows, best) in found.items()}
    claims = [
        Claim(f"seed {s} ends within {GAP} below the maximum", -1e-6 <= gap[-1] <= GAP)
        for s, gap in gaps.items()
    ]
    table = [
        (s, f"{best:.5f}", f"{rows[0]['objective']:.5f}", f"{rows[-1]['objective']:.5f}",
         f"{gaps[s][-1]:.5f}", f"{rows[-1]['kl']:.3f}")
        for s, (rows, best) in found.items()
    ]  # fmt: skip
    svg = drawing(
        "How far the objective is below its maximum",
        [Curve(f"seed {s}", [_log10(value) for value in gap]) for s, gap in gaps.items()],
        [Level(f"{GAP}", _log10(GAP))],
        unit="log10 of reward units",
    )
    return Evidence(
        "The KL-regularised optimum",
        "Responses of at most two tokens from a vocabulary of five, each with a fixed reward. The "
        "objective, reward less beta times KL to the starting model, has the maximum beta log Z "
        "(Ziegler et al. 1909.08593 eq. 2, Rafailov et al. 2305.18290 eq. 4). All responses can be "
        "listed, so objective and maximum are exact. Each seed has another starting model, hence "
        f"another maximum; beta is {optimum.BETA}.",
        optimum.CONFIG,
        claims,
        ("seed", "beta log Z", "at the start", "at the end", "gap", "KL, nats"),
        table,
        {"best": {s: best for s, (_, best) in found.items()}},
        {s: rows for s, (rows, _) in found.items()},
        svg,
    )


def _log10(gap: float) -> float:
    """Of a gap; float32 knows none below a millionth."""
    return math.log10(max(gap, 1e-6))


def adaptive_kl() -> Evidence:
    """The coefficient finds the value at which the KL is what was asked for."""
    target = control.CONFIG.kl.target
    curves = {str(seed): control.learn(seed=seed) for seed in SEEDS}
    claims, table, settled = [], [], {}
    for seed, rows in curves.items():
        mean = settled[seed] = control.settled(rows)
        coefs = [row["objective/kl_coef"] for row in rows]
        claims.append(
            Claim(
                f"seed {seed} settles within {SETTLED:.0%} of the target",
                abs(mean / target - 1) <= SETTLED,
            )
        )
        last = control.settled(rows, "objective/kl_coef")
        table.append(
            (seed, f"{target:.1f}", f"{mean:.3f}", f"{coefs[0]:.3f}", f"{min(coefs):.3f}",
             f"{last:.3f}", f"{control.settled(rows, 'env/reward_mean'):.3f}")
        )  # fmt: skip
    first = curves[str(SEEDS[0])]
    svg = drawing(
        f"KL per response, and 20 times its coefficient (seed {SEEDS[0]})",
        [
            Curve("KL", [row["objective/kl"] for row in first], first=1),
            Curve("20 beta", [20 * row["objective/kl_coef"] for row in first], first=1),
        ],
        [Level("target", target)],
        unit="nats",
    )
    return Evidence(
        "The adaptive KL coefficient in a closed loop",
        "A fresh model is paid for words of one half of the vocabulary; nothing but the penalty "
        "keeps it from writing those alone. The coefficient falls while the KL is below its "
        "target, rises when that is overshot, and stays where it holds it. Settled values are "
        f"means over the last {control.LAST} iterations.",
        control.CONFIG,
        claims,
        ("seed", "target, nats", "settled KL", "first beta", "lowest", "settled beta", "reward"),
        table,
        {"target": target, "settled": settled},
        curves,
        svg,
    )


PARTS: dict[str, Callable[[], Evidence]] = {
    "random_walks": random_walks,
    "bf16": half_precision,
    "optimum": closed_form,
    "adaptive_kl": adaptive_kl,
}
