"""How votes become scores, scores become pairs, and questions become splits.

Nothing here reads a file or keeps a state: each choice is a function of ids, a site and a seed, so
neither the order of rows nor the size of a buffer can change it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final

from suasion.core.errors import ConfigError
from suasion.core.seeding import seed_of

SPLITS: Final = ("supervised", "reward", "policy", "evaluation")
"""The four shares of the questions; no question is in two of them."""

DEFAULT_FRACTIONS: Final[Mapping[str, float]] = {
    "supervised": 0.3,
    "reward": 0.3,
    "policy": 0.3,
    "evaluation": 0.1,
}
"""The shares of the published pipeline (lvwerra/stack-exchange-paired on the Hugging Face Hub)."""

_HASH_RANGE: Final = 2.0**63


def vote_score(votes: int, *, accepted: bool) -> int:
    """Score of an answer: `round(log2(1 + votes))`, plus 1 if accepted; -1 if votes are negative.

    `log2(1 + n)` is never half-way between two integers, so the rounding mode does not matter. An
    answer both accepted and negative scores -1: the sources leave that case open.

    Args:
        votes: Up-votes minus down-votes, as the dump's `Score` attribute has it.
        accepted: Whether the asker accepted the answer.

    Source: Askell et al. 2021, arXiv 2112.00861, appendix C.1; StackLLaMA
    (huggingface/blog, stackllama.md).
    """
    if votes < 0:
        return -1
    return round(math.log2(1 + votes)) + int(accepted)


def count_unequal(scores: Sequence[int]) -> int:
    """Number of unordered pairs whose two scores differ."""
    return math.comb(len(scores), 2) - sum(math.comb(n, 2) for n in Counter(scores).values())


def choose_pairs(
    scores: Sequence[int], ids: Sequence[int], *, max_pairs: int, key: Sequence[str | int]
) -> list[tuple[int, int]]:
    """Choose at most `max_pairs` of a question's pairs `i < j` with unequal scores.

    Args:
        scores: Score per answer.
        ids: Answer id per answer, ascending: the choice hangs on these and not on positions.
        max_pairs: The most pairs a question may give.
        key: Seed, site and question id.

    Returns:
        Positions `(chosen, rejected)`, the higher score first, in order of position.
    """
    unequal = _unequal(scores)
    if count_unequal(scores) > max_pairs:
        seed, *names = key
        unequal = iter(
            sorted(
                heapq.nsmallest(
                    max_pairs,
                    unequal,
                    key=lambda ij: seed_of(int(seed), "pair", *names, ids[ij[0]], ids[ij[1]]),
                )
            )
        )
    return [(i, j) if scores[i] > scores[j] else (j, i) for i, j in unequal]


def _unequal(scores: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j])


def split_of(question_id: int, *, site: str, seed: int, fractions: Mapping[str, float]) -> str:
    """Name of the split a question belongs to, drawn with probabilities `fractions`."""
    point = seed_of(seed, "split", site, question_id) / _HASH_RANGE
    edge = 0.0
    for name in SPLITS:
        edge += fractions[name]
        if point < edge:
            return name
    # Fractions may sum to 1 - 1e-16: what is above the last edge goes to the last split in use.
    return next(name for name in reversed(SPLITS) if fractions[name] > 0)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Refuse fractions that are not four shares of one.

    Raises:
        ConfigError: a name is missing or unknown, a share is negative, or they do not sum to 1.
    """
    if set(fractions) != set(SPLITS):
        raise ConfigError(
            f"data.fractions has the names {sorted(fractions)}", f"name exactly {', '.join(SPLITS)}"
        )
    bad = {name: f for name, f in fractions.items() if not (math.isfinite(f) and f >= 0)}
    total = sum(fractions.values())
    if bad or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"data.fractions sums to {total:g}" if not bad else f"data.fractions holds {bad}",
            "give shares between 0 and 1 that sum to 1",
        )
