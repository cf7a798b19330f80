"""Rewards per token, rules for scores, running moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suasion.functional import rewards

MASK = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
SCORES = torch.tensor([1.5, -2.0, 0.25], dtype=torch.float64)


def test_the_score_stands_on_the_last_counted_token() -> None:
    """Right padding, left padding, and a hole."""
    assert rewards.last_token_index(MASK).tolist() == [1, 2, 2]
    placed = rewards.terminal_rewards(SCORES, MASK)
    assert placed.tolist() == [[0, 1.5, 0], [0, 0, -2.0], [0, 0, 0.25]]
    assert rewards.last_token_index(torch.tensor([[True, False, False]])).tolist() == [0]


def test_an_answer_without_tokens_has_no_place_for_a_score() -> None:
    """The row is named."""
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        rewards.terminal_rewards(SCORES[:2], torch.tensor([[True, False], [False, False]]))


def test_kl_is_paid_at_every_token_and_nowhere_else() -> None:
    """Penalty by hand, garbage outside the mask, and the sum over an answer."""
    kl = torch.tensor([[0.5, 1.0, math.nan], [math.inf, 2.0, -1.0], [1.0, math.nan, 0.0]]).double()
    got = rewards.token_rewards(SCORES, kl, MASK, kl_coef=0.5)
    assert got.tolist() == [[-0.25, 1.0, 0], [0, -1.0, -1.5], [-0.5, 0, 0.25]]
    plain = rewards.token_rewards(SCORES, kl, MASK, kl_coef=0.0)
    assert torch.equal(plain, rewards.terminal_rewards(SCORES, MASK))


def test_unfinished_answers_replaced_or_fined() -> None:
    """Two rules that differ: one forgets the score, the other keeps it."""
    ended = torch.tensor([True, False, False])
    replaced = rewards.replace_without_eos(SCORES, ended)
    assert replaced.tolist() == [1.5, -1.0, -1.0]
    assert rewards.replace_without_eos(SCORES, ended, value=-3.0).tolist() == [1.5, -3.0, -3.0]
    assert rewards.subtract_without_eos(SCORES, ended).tolist() == [1.5, -3.0, -0.75]
    assert rewards.subtract_without_eos(SCORES, ended, penalty=0.5).tolist() == [1.5, -2.5, -0.25]


def test_overlong_penalty_by_hand() -> None:
    """Nothing, then a line, then everything; another factor scales it."""
    lengths = torch.tensor([0, 6, 7, 8, 9, 10, 99])
    half = rewards.overlong_penalty(lengths, max_length=10, buffer=4, factor=2.0)
    assert half.tolist() == [0, 0, -0.5, -1.0, -1.5, -2.0, -2.0]
    plain = rewards.overlong_penalty(lengths, max_length=10, buffer=4)
    assert plain.tolist() == (half / 2).tolist()
    assert rewards.overlong_penalty(lengths[5:], max_length=10, buffer=1).tolist() == [-1.0, -1.0]
    assert rewards.overlong_penalty(lengths[:2], max_length=6, buffer=6).tolist() == [0.0, -1.0]


@pytest.mark.parametrize("buffer", [0, 11])
def test_overlong_buffer_fits_the_length(buffer: int) -> None:
    """No buffer, or one longer than an answer."""
    with pytest.raises(ValueError, match=rf"1\.\.10, got {buffer}"):
        rewards.overlong_penalty(torch.tensor([3]), max_length=10, buffer=buffer)


def test_clipping_is_symmetric() -> None:
    """Both sides, and a bound that means nothing."""
    assert rewards.clip_scores(SCORES, 1.0).tolist() == [1.0, -1.0, 0.25]
    assert rewards.clip_scores(SCORES, 0.5).tolist() == [0.5, -0.5, 0.25]
    for bound in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            rewards.clip_scores(SCORES, bound)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_moments_do_not_depend_on_the_batching(batches: list[list[float]]) -> None:
    """Batch by batch equals all at once."""
    parts = rewards.RunningMoments()
    for batch in batches:
        parts = parts.update(torch.tensor(batch, dtype=torch.float64))
    everything = torch.tensor([x for batch in batches for x in batch], dtype=torch.float64)
    whole = rewards.RunningMoments().update(everything)
    assert parts.count == whole.count == everything.numel()
    assert parts.mean == pytest.approx(float(everything.mean()), rel=1e-9, abs=1e-9)
    assert parts.var == pytest.approx(float(everything.var(correction=0)), rel=1e-9, abs=1e-6)


def test_moments_of_large_numbers_keep_their_variance() -> None:
    """The naive mean of squares loses it: 1e9 and 1e9 + 1 in float32 batches of one."""
    moments = rewards.RunningMoments()
    for x in (1e9, 1e9 + 1.0, 1e9 + 2.0):
        moments = moments.update(torch.tensor([x], dtype=torch.float64))
    assert moments.std == pytest.approx(1.0, rel=1e-6)


def test_moments_before_they_mean_anything() -> None:
    """No score, one score, two."""
    fresh = rewards.RunningMoments()
    assert fresh == rewards.RunningMoments(mean=0.0, var=1.0, count=0.0)
    assert fresh.std == 1.0
    one = fresh.update(torch.tensor([4.0]))
    assert (one.mean, one.var, one.count, one.std) == (4.0, 0.0, 1.0, 1.0)
    two = one.update(torch.tensor([6.0]))
    assert (two.mean, two.var, two.count) == (5.0, 1.0, 2.0)
    assert two.std == pytest.approx(math.sqrt(2), rel=1e-12)
    assert fresh.count == 0.0, "the old state is left alone"
    assert {type(x) for x in (two.mean, two.var, two.count)} == {float}, "it goes to JSON"


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf]])
def test_moments_refuse_what_would_poison_them(scores: list[float]) -> None:
    """Nothing, NaN and infinity."""
    with pytest.raises(ValueError, match="finite"):
        rewards.RunningMoments().update(torch.tensor(scores))


def test_scaling_divides_and_only_centres_when_told() -> None:
    """A score of zero stays zero by default."""
    assert rewards.scale_scores(SCORES, std=2.0, eps=0.0).tolist() == [0.75, -1.0, 0.125]
    assert rewards.scale_scores(SCORES, std=2.0, mean=0.5, eps=0.0)[0] == 0.5
    assert rewards.scale_scores(SCORES, std=2.0, eps=2.0).tolist() == [0.375, -0.5, 0.0625]
    assert rewards.scale_scores(SCORES, std=0.0)[0].item() == pytest.approx(1.5e8, rel=1e-12)


def test_normalised_scores_have_the_wanted_moments() -> None:
    """Gain and bias do what they are for; scores without spread are refused."""
    gain, bias = rewards.affine_normalisation(SCORES, target_mean=0.5, target_std=2.0)
    done = gain * SCORES + bias
    assert done.mean().item() == pytest.approx(0.5, rel=1e-9)
    assert done.std(correction=0).item() == pytest.approx(2.0, rel=1e-9)
    assert (type(gain), type(bias)) == (float, float), "they go to JSON"
    narrow, _ = rewards.affine_normalisation(SCORES / 100)
    assert narrow == pytest.approx(50 * gain, rel=1e-9)
    standard = rewards.affine_normalisation(SCORES)
    assert standard == rewards.affine_normalisation(SCORES, target_mean=0.0, target_std=1.0)
    for scores in ([1.0, 1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="vary"):
            rewards.affine_normalisation(torch.tensor(scores))
