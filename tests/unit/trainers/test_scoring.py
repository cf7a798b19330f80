"""From raw scores to the policy's: which rule comes first, and what is remembered."""

from __future__ import annotations

import pytest
import torch

from suasion.config.schema import ScoreConfig
from suasion.trainers.scoring import ScoreShaper

RAW = torch.tensor([2.0, -1.0, 5.0, 0.5])
ENDED = torch.tensor([True, False, True, False])
LENGTHS = torch.tensor([3, 10, 8, 9])
LONGEST = 10


def shaper(config: ScoreConfig) -> ScoreShaper:
    """Of responses up to `LONGEST` tokens."""
    return ScoreShaper(config, LONGEST)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ScoreConfig(), [2.0, -1.0, 5.0, 0.5]),
        (ScoreConfig(baseline=1.5), [0.5, -2.5, 3.5, -1.0]),
        (ScoreConfig(clip=1.0), [1.0, -1.0, 1.0, 0.5]),
        (ScoreConfig(no_eos="replace", no_eos_value=-4.0), [2.0, -4.0, 5.0, -4.0]),
        (ScoreConfig(no_eos="subtract", no_eos_value=-4.0), [2.0, -5.0, 5.0, -3.5]),
        (ScoreConfig(no_eos="subtract", no_eos_value=4.0), [2.0, -5.0, 5.0, -3.5]),
        # In this order: the rule, the baseline, the clip.
        (
            ScoreConfig(no_eos="replace", no_eos_value=-4.0, baseline=1.0, clip=3.0),
            [1.0, -3.0, 3.0, -3.0],
        ),
        # Nothing up to 6 of 10 tokens, all of it at 10; before baseline and clip.
        (ScoreConfig(overlong=4), [2.0, -2.0, 4.5, -0.25]),
        (
            ScoreConfig(overlong=4, overlong_penalty=2.0, baseline=1.0, clip=3.0),
            [1.0, -3.0, 3.0, -2.0],
        ),
    ],
)
def test_rules_apply_in_order(config: ScoreConfig, expected: list[float]) -> None:
    """The no-EOS rule first, the clip last."""
    shaped = shaper(config)(RAW.clone(), ENDED, LENGTHS)
    assert shaped.tolist() == pytest.approx(expected)


def test_scaling_comes_between_baseline_and_clip() -> None:
    """By the running deviation, of which the baseline is no part."""
    plain = shaper(ScoreConfig(scale=True))(RAW, ENDED, LENGTHS)
    moved = shaper(ScoreConfig(scale=True, baseline=1.0))(RAW, ENDED, LENGTHS)
    clipped = shaper(ScoreConfig(scale=True, baseline=1.0, clip=0.5))(RAW, ENDED, LENGTHS)
    ratio = plain / RAW
    torch.testing.assert_close(ratio, ratio[0].expand(4))
    torch.testing.assert_close(moved, (RAW - 1) * ratio)
    torch.testing.assert_close(clipped, moved.clamp(-0.5, 0.5))


def test_the_running_deviation_survives_a_restart() -> None:
    """Its state is plain values."""
    whole = shaper(ScoreConfig(scale=True))
    whole(RAW, ENDED, LENGTHS)
    resumed = shaper(ScoreConfig(scale=True))
    resumed.restore(whole.state())
    fresh = shaper(ScoreConfig(scale=True))
    again = whole(3 * RAW, ENDED, LENGTHS)
    assert torch.equal(resumed(3 * RAW, ENDED, LENGTHS), again)
    assert not torch.equal(fresh(3 * RAW, ENDED, LENGTHS), again)


def test_raw_scores_are_left_as_they_were() -> None:
    """They are logged beside the shaped ones."""
    raw = RAW.clone()
    shaper(ScoreConfig(no_eos="replace", baseline=1.0, clip=1.0))(raw, ENDED, LENGTHS)
    assert torch.equal(raw, RAW)
