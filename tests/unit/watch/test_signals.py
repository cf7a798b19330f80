"""Health signals: silent on a sound run, each one heard once when its trouble begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from suasion.trainers.ppo_stats import text_statistics
from suasion.watch import signals
from suasion.watch.signals import SIGNALS, Row, warnings_about

SOUND: Row = {
    "objective/kl": 4.0,
    "objective/kl_coef": 0.2,
    "ppo/policy/first_approxkl": 1e-12,
    "ppo/policy/ratio": 1.001,
    "ppo/policy/clipfrac": 0.05,
    "ppo/policy/entropy": 2.0,
    "env/reward_std": 0.8,
    "tokens/responses_len_mean": 40.0,
    "tokens/unfinished": 0.1,
    "text/repeated": 0.05,
    "text/code_fences": 0.2,
    "ppo/loss/value": 0.5,
    "ppo/grad_norm": 1.0,
    "ppo/val/var_explained": 0.3,
}


def history(rows: int, **last: float) -> list[Row]:
    """A sound run that wobbles, but for what is given of the last row; `__` stands for `/`."""
    found = [
        {k: v * (1 + 0.05 * math.sin(3 * step + len(k))) for k, v in SOUND.items()}
        for step in range(rows)
    ]
    found[-1] |= {name.replace("__", "/"): value for name, value in last.items()}
    return found


def test_sound_run_is_silent() -> None:
    """Whatever its length, the first iteration too."""
    rows = history(60)
    for length in range(1, 61):
        assert warnings_about(rows[:length]) == []


LAST: list[tuple[Any, dict[str, float], str]] = [
    (signals.negative_kl, {"objective__kl": -1.5}, "KL is -1.50"),
    (signals.kl_jump, {"objective__kl": 30.0}, "jumped from 4"),
    (signals.first_ratio, {"ppo__policy__first_approxkl": 0.02}, "0.02"),
    (signals.mean_ratio, {"ppo__policy__ratio": 2.1}, "2.1"),
    (signals.mean_ratio, {"ppo__policy__ratio": 0.1}, "0.1"),
    (signals.clipping, {"ppo__policy__clipfrac": 0.31}, "31%"),
    (signals.entropy_collapse, {"ppo__policy__entropy": 0.3}, "to 0.30 nats"),
    (signals.reward_spread, {"env__reward_std": 0.05}, "to 0.05"),
    (signals.length_explosion, {"tokens__responses_len_mean": 90.0}, "to 90 tokens"),
    (signals.unfinished, {"tokens__unfinished": 0.5}, "to 50%"),
    (signals.repetition, {"text__repeated": 0.4}, "to 40%"),
    (signals.code_fences, {"text__code_fences": 4.0}, "to 4.0 per response"),
    (signals.value_spike, {"ppo__loss__value": 9.0}, "leapt to 9"),
    (signals.gradient_spike, {"ppo__grad_norm": 15.0}, "leapt to 15"),
]


@pytest.mark.parametrize(
    ("signal", "last", "said"), LAST, ids=[f"{each.__name__}-{said}" for each, _, said in LAST]
)
def test_one_trouble_one_warning(
    signal: Callable[[list[Row]], str | None], last: dict[str, float], said: str
) -> None:
    """The one that looks for it says so, no other one does, and not again while it lasts."""
    rows = history(30, **last)
    (message,) = warnings_about(rows)
    assert message == signal(rows)
    assert said in message
    if signal not in (signals.kl_jump, signals.value_spike, signals.gradient_spike):
        assert warnings_about([*rows, rows[-1]]) == []


def test_unexplained_returns() -> None:
    """A critic needs time; after that it must be better than a constant."""
    bad = [{**row, "ppo/val/var_explained": -0.2} for row in history(40)]
    told = [length for length in range(1, 41) if warnings_about(bad[:length])]
    assert told == [signals.EXPLAINED_AFTER]


def test_rising_coefficient() -> None:
    """Only a rise without a pause, and by enough."""
    risen = [{**row, "objective/kl_coef": 0.1 * 1.03**at} for at, row in enumerate(history(25))]
    told = [length for length in range(1, 26) if warnings_about(risen[:length])]
    assert told == [signals.COEF_ROWS]
    paused = [dict(row) for row in risen]
    paused[10]["objective/kl_coef"] = paused[9]["objective/kl_coef"]
    assert warnings_about(paused[:25]) == []
    slow = [{**row, "objective/kl_coef": 0.1 * 1.001**at} for at, row in enumerate(risen)]
    assert warnings_about(slow) == []


def test_a_spike_from_nothing_is_none() -> None:
    """A loss that was zero throughout has no usual size."""
    rows = [{**row, "ppo/loss/value": 0.0} for row in history(20)]
    assert signals.value_spike(rows) is None


def test_thresholds_are_told_of() -> None:
    """docs/checks.md names every signal."""
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "checks.md").read_text(encoding="utf-8")
    missing = [signal.__name__ for signal in SIGNALS if f"`{signal.__name__}`" not in text]
    assert not missing


def test_text_statistics() -> None:
    """By hand: of two and five four-word sequences two repeat; three fences in three texts."""
    repeated = "a b c d e"
    found = text_statistics([repeated, "a b c d a b c d", "```x```\n```"])
    assert found == {"text/repeated": 1 / 7, "text/code_fences": 1.0}
    assert text_statistics(["", "one"]) == {"text/repeated": 0.0, "text/code_fences": 0.0}
