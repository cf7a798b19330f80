"""How good a reward model is: accuracy with its interval, beside the rule "longer wins"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from suasion.core.errors import DataError
from suasion.data.sources import Source, spread
from suasion.evaluate.statistics import longer_wins, pair_accuracy
from suasion.rollout.rewards import Checked, Reward, RewardModel
from suasion.trainers.reward import pair_scores, token_pairs


@dataclass(frozen=True)
class RewardCard:
    """A reward on held-out pairs."""

    accuracy: float
    """Share of pairs whose chosen answer scores strictly higher."""
    accuracy_low: float
    """Lower end of its interval."""
    accuracy_high: float
    """Upper end."""
    mean_chosen: float
    """Mean score of the chosen answers."""
    mean_rejected: float
    """Mean score of the rejected ones."""
    pairs: int
    """How many pairs."""
    longer_wins_accuracy: float
    """Accuracy of preferring the longer text."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def held_out_pairs(source: Source, limit: int) -> list[dict[str, Any]]:
    """Pairs of the evaluation split, evenly spread over it."""
    return spread(source.pairs("evaluation"), limit)


def reward_card(
    reward: Checked, rows: Sequence[dict[str, Any]], *, level: float, max_length: int | None
) -> RewardCard:
    """Judge pairs.

    A reward model reads tokens, its query cut where a text is too long; any other reward reads
    texts.

    Raises:
        DataError: there are no pairs.
    """
    if not rows:
        raise DataError("there are no held-out pairs to evaluate on")
    if isinstance(reward.reward, RewardModel) and max_length is not None:
        judge = reward.reward
        tokens = token_pairs(list(rows), judge.codec, max_length, "cut", "evaluation pairs")
        chosen, rejected = pair_scores(judge, tokens)
    else:
        chosen, rejected = _text_scores(reward, rows)
    found = pair_accuracy(chosen, rejected, level=level)
    return RewardCard(
        accuracy=found.accuracy,
        accuracy_low=found.low,
        accuracy_high=found.high,
        mean_chosen=sum(chosen) / len(chosen),
        mean_rejected=sum(rejected) / len(rejected),
        pairs=len(chosen),
        longer_wins_accuracy=longer_wins(
            [len(row["chosen"]) for row in rows], [len(row["rejected"]) for row in rows]
        ),
    )


def _text_scores(reward: Reward, rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    queries = [row["query"] for row in rows]
    chosen = list(reward(queries, [row["chosen"] for row in rows]))
    rejected = list(reward(queries, [row["rejected"] for row in rows]))
    return chosen, rejected
