"""Scores, pairs and splits."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion.core.errors import ConfigError
from suasion.data.scoring import (
    DEFAULT_FRACTIONS,
    SPLITS,
    check_fractions,
    choose_pairs,
    count_unequal,
    split_of,
    vote_score,
)
from tests.unit.data.dumps import log_table

KEY = (7, "a.example", 12)


@pytest.mark.parametrize(
    ("votes", "score"),
    [(0, 0), (1, 1), (2, 2), (4, 2), (5, 3), (10, 3), (11, 4), (22, 5), (44, 5), (45, 6)],
)
def test_score_of_the_published_examples(votes: int, score: int) -> None:
    """The table that the sources print."""
    assert vote_score(votes, accepted=False) == score
    assert vote_score(votes, accepted=True) == score + 1


@pytest.mark.parametrize(("first", "score"), log_table().items())
def test_score_changes_exactly_at_its_thresholds(first: int, score: int) -> None:
    """One vote below a threshold is one score less."""
    assert vote_score(first, accepted=False) == score
    assert vote_score(first - 1, accepted=False) == score - 1


@given(st.integers(max_value=-1), st.booleans())
def test_negative_votes_score_minus_one_even_when_accepted(votes: int, accepted: bool) -> None:  # noqa: FBT001
    """The -1 rule comes before the accepted mark."""
    assert vote_score(votes, accepted=accepted) == -1


@given(st.integers(min_value=0, max_value=10**17), st.booleans())
def test_score_never_falls_with_votes(votes: int, accepted: bool) -> None:  # noqa: FBT001
    """More votes never score less, and one vote moves one step at most."""
    here = vote_score(votes, accepted=accepted)
    assert 0 <= vote_score(votes + 1, accepted=accepted) - here <= 1


@given(st.lists(st.integers(-1, 4), max_size=14), st.integers(1, 12))
def test_pairs_are_unequal_ordered_distinct_and_as_many_as_allowed(
    scores: list[int], max_pairs: int
) -> None:
    """What every choice of pairs must satisfy."""
    ids = list(range(100, 100 + len(scores)))
    unequal = sum(a != b for a, b in combinations(scores, 2))
    assert count_unequal(scores) == unequal
    pairs = choose_pairs(scores, ids, max_pairs=max_pairs, key=KEY)
    assert len(pairs) == len({frozenset(p) for p in pairs}) == min(unequal, max_pairs)
    assert all(scores[chosen] > scores[rejected] for chosen, rejected in pairs)


def test_chosen_pairs_hang_on_ids_and_seed_and_are_spread() -> None:
    """The choice follows ids and seed, and favours no answer."""
    scores, ids = list(range(20)), list(range(20))
    first = choose_pairs(scores, ids, max_pairs=10, key=KEY)
    assert first == choose_pairs(scores, ids, max_pairs=10, key=KEY)
    assert first != choose_pairs(scores, ids, max_pairs=10, key=(8, *KEY[1:]))
    assert first != choose_pairs(scores, [i + 1 for i in ids], max_pairs=10, key=KEY)
    # Negative control for "the first ten": over many questions every answer takes part.
    seen = Counter(
        i
        for q in range(200)
        for pair in choose_pairs(scores, ids, max_pairs=10, key=(7, "a.example", q))
        for i in pair
    )
    assert min(seen.values()) > 0.7 * 200
    assert max(seen.values()) < 1.3 * 200


def test_splits_have_their_shares() -> None:
    """Shares are met within sampling noise."""
    drawn = Counter(
        split_of(q, site="a.example", seed=1, fractions=DEFAULT_FRACTIONS) for q in range(20_000)
    )
    for name in SPLITS:
        assert drawn[name] / 20_000 == pytest.approx(DEFAULT_FRACTIONS[name], abs=0.012)


def test_splits_differ_between_sites_and_seeds() -> None:
    """Question 1 of every site must not always meet the same fate."""

    def home(site: str, seed: int) -> list[str]:
        return [split_of(q, site=site, seed=seed, fractions=DEFAULT_FRACTIONS) for q in range(50)]

    assert home("a.example", 1) == home("a.example", 1)
    assert home("a.example", 1) != home("b.example", 1)
    assert home("a.example", 1) != home("a.example", 2)


def test_a_split_without_a_share_gets_nothing() -> None:
    """A share of 0 is no question."""
    fractions = {"supervised": 0.5, "reward": 0.5, "policy": 0.0, "evaluation": 0.0}
    drawn = {split_of(q, site="a.example", seed=1, fractions=fractions) for q in range(2_000)}
    assert drawn == {"supervised", "reward"}


@pytest.mark.parametrize(
    "fractions",
    [
        {"supervised": 1.0},
        {**DEFAULT_FRACTIONS, "test": 0.0},
        {**DEFAULT_FRACTIONS, "policy": 0.4},
        {**DEFAULT_FRACTIONS, "policy": -0.3, "reward": 0.9},
        {**DEFAULT_FRACTIONS, "policy": float("nan")},
    ],
)
def test_fractions_that_are_not_shares_are_refused(fractions: dict[str, float]) -> None:
    """Names, signs, sum and NaN are checked."""
    with pytest.raises(ConfigError, match=r"data\.fractions"):
        check_fractions(fractions)
