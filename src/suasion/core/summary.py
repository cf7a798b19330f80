"""The figures of a whole run in one flat record: what `summary.json` holds and a table shows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from suasion.core.errors import DataError
from suasion.core.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One number per question one asks of a run; None where the run has no answer.

    Example:
        >>> Summary(kl=4.2, seconds=310.0).reward_accuracy is None
        True
    """

    perplexity_before: float | None = None
    """exp(mean loss per token) of the base model on held-out text; no unit, at least 1."""
    perplexity_after: float | None = None
    """The same after supervised fine-tuning."""
    reward_accuracy: float | None = None
    """Share of held-out pairs whose chosen answer the reward model scores higher, in [0, 1]."""
    reward_accuracy_low: float | None = None
    """Lower end of the 95 % interval of `reward_accuracy`."""
    reward_accuracy_high: float | None = None
    """Upper end of the 95 % interval of `reward_accuracy`."""
    reward_ceiling: float | None = None
    """Pair accuracy that a perfect scorer reaches on the same pairs, in [0, 1]."""
    longer_wins_accuracy: float | None = None
    """Pair accuracy of always preferring the longer answer, in [0, 1]."""
    score_sft: float | None = None
    """Mean reward-model score of the answers before PPO; in the reward model's own units."""
    score_ppo: float | None = None
    """Mean reward-model score of the answers after PPO; same units."""
    gold_sft: float | None = None
    """Mean score before PPO from the gold scorer, which training never saw; its own units."""
    gold_ppo: float | None = None
    """Mean score after PPO from the gold scorer; same units."""
    win_rate: float | None = None
    """Share of held-out prompts on which PPO's answer beats the one before, ties half."""
    win_rate_low: float | None = None
    """Lower end of the 95 % interval of `win_rate`."""
    win_rate_high: float | None = None
    """Upper end of the 95 % interval of `win_rate`."""
    kl: float | None = None
    """Mean KL(policy || reference) of an answer, in nats, summed over its tokens."""
    seconds: float | None = None
    """Wall-clock time of all stages, in seconds."""

    def write(self, path: Path) -> None:
        """Write the record as JSON with every key present.

        A figure that is not finite (the run diverged) becomes null: JSON has no NaN.

        Raises:
            StorageError: the disk refused.
        """
        write_json(path, {name: _finite(value) for name, value in asdict(self).items()})

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read what `write` wrote; a key that is absent is None.

        Raises:
            DataError: missing, not a JSON object, an unknown key, or a value that is no number.
        """
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: not a JSON object", "delete it and evaluate the run again")
        known = {field.name for field in fields(cls)}
        for key, value in content.items():
            if key not in known:
                raise DataError(
                    f"{path}: unknown key {key!r}", f"the keys are {', '.join(sorted(known))}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise DataError(f"{path}: {key} is {value!r}, not a number or null")
        return cls(**{key: _finite(value) for key, value in content.items()})


def summary_table(summary: Summary) -> Table:
    """The figures as a terminal table: before, after, 95 % interval; unknown rows left out."""
    s = summary
    table = Table(title="What the run did", title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("before", "after", "95 % interval"):
        table.add_column(heading, justify="right")
    accuracy = (s.reward_accuracy_low, s.reward_accuracy_high)
    rows: list[tuple[str, str, str, str]] = [
        ("perplexity", _plain(s.perplexity_before), _plain(s.perplexity_after), ""),
        ("reward model accuracy", "", _share(s.reward_accuracy), _interval(*accuracy)),
        ("  always the longer answer", "", _share(s.longer_wins_accuracy), ""),
        ("  a perfect scorer", "", _share(s.reward_ceiling), ""),
        ("reward score", _plain(s.score_sft), _plain(s.score_ppo), ""),
        ("gold score", _plain(s.gold_sft), _plain(s.gold_ppo), ""),
        ("win rate of PPO", "", _share(s.win_rate), _interval(s.win_rate_low, s.win_rate_high)),
        ("KL from the reference, nats", "", _plain(s.kl), ""),
        ("time", "", _duration(s.seconds), ""),
    ]
    for row in rows:
        if any(row[1:]):
            table.add_row(*row)
    return table


def _finite(value: Any) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: float | None) -> str:
    """Two decimals, or none for large numbers."""
    if _finite(value) is None or value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _share(value: float | None) -> str:
    return f"{value:.1%}" if _finite(value) is not None else ""


def _interval(low: float | None, high: float | None) -> str:
    return f"{_share(low)} to {_share(high)}" if _share(low) and _share(high) else ""


def _duration(seconds: float | None) -> str:
    if _finite(seconds) is None or seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
