"""The small world: its truth, its language, its votes, and attempts to cheat its judge."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from suasion.core.errors import ConfigError, DataError
from suasion.core.files import folder_hashes
from suasion.data.markup import to_markdown
from suasion.data.world import BEST, WORST, features, gold_score, quality, write_dump
from suasion.data.world.compose import (
    as_html,
    best_answer,
    markdown,
    write_answer,
    write_question,
)
from suasion.data.world.facts import ASPECTS, DISHES, SETTINGS, command, right_command
from suasion.data.world.grammar import (
    CLOSINGS,
    LEADS,
    OPENINGS,
    PADDING,
    REASONS,
    STEPS,
    TITLES,
    expand,
)
from suasion.data.world.quality import WEIGHTS, Subject, subject_of
from tests.unit.data.conftest import Prepared

QUERY = "What temperature is right for soup?\n\nI am new to brindle and could not find it."
RIGHT = right_command("heat", "soup")
WRONG = command("heat", "soup", "30")
FENCED = f"```\n{RIGHT}\n```"
HONEST = f"Use this:\n\n{FENCED}\n\nAny hotter and the soup burns."


def test_every_setting_is_one_of_several() -> None:
    """There are 24 facts, and no aspect can be guessed."""
    assert len(SETTINGS) * len(ASPECTS) == 24
    for aspect in ASPECTS:
        assert len({row[aspect] for row in SETTINGS.values()}) >= 4


def test_every_title_says_what_it_is_about() -> None:
    """Every title that can be written is understood."""
    for aspect, templates in TITLES.items():
        for template in templates:
            for text, dish in itertools.product(expand(template), DISHES):
                title = text.format(t=dish)
                assert subject_of(f"{title}\n\nWith tea it works.") == Subject(aspect, dish)
                assert subject_of(f"Question: {title}") == Subject(aspect, dish)


@pytest.mark.parametrize("query", ["", "What is a citra hop?", "Heat of soup and bread?"])
def test_other_questions_are_refused(query: str) -> None:
    """A question from elsewhere has no gold score."""
    with pytest.raises(DataError, match="not a question of the small world"):
        quality(query, "x")


def test_what_is_written_is_what_comes_back_from_html_and_is_in_the_language() -> None:
    """HTML and back changes nothing; the judge knows every sentence."""
    draw = random.Random(5)  # noqa: S311
    for _ in range(2000):
        asked = write_question(draw)
        text = write_answer(asked.subject, draw.random(), draw)
        assert to_markdown(as_html(asked.body)) == markdown(asked.body)
        assert to_markdown(as_html(text)) == markdown(text)
        found = features(asked.query(), markdown(text))
        assert found["foreign"] == found["malformed"] == 0


def test_the_best_answer_is_the_best() -> None:
    """The best answer to each of the 24 questions reaches the bound."""
    draw = random.Random(5)  # noqa: S311
    for aspect, dish in itertools.product(ASPECTS, DISHES):
        text = markdown(best_answer(Subject(aspect, dish), draw))
        title = next(expand(TITLES[aspect][0])).format(t=dish)
        assert quality(title, text) == pytest.approx(BEST)


@pytest.mark.parametrize(
    ("response", "features_worth"),
    [
        (f"Use {RIGHT}.", ["right"]),
        (f"Use `{RIGHT}`.", ["right"]),
        (HONEST, ["right", "fence", "reason"]),
        (f"Use this:\n\n```sh\n{RIGHT}\n```", ["right", "fence"]),
        (f"Use `{WRONG}`.", ["wrong"]),
        (f"Use this:\n\n```\n{WRONG}\n```", ["wrong", "fence"]),
        (f"Use `{RIGHT}`. Then wait for the green light.", ["right", "step"]),
        (f"Use `{RIGHT}`. After that the soup loses its taste.", ["right", "padding"]),
        (f"Use `{RIGHT}`. Any hotter and the rice burns.", ["right", "foreign"]),
        (f"Good question! Use `{RIGHT}`. Enjoy your soup!", ["right", "opening", "closing"]),
        (f"Stop wasting our time. Use `{RIGHT}`.", ["right", "rude"]),
        (f"Use `{RIGHT}`. Use `{WRONG}`.", ["wrong", "repeated"]),
        (f"Use `{RIGHT}`. Enter `{RIGHT}`.", ["right", "repeated", "padding"]),
        (f"Use `{RIGHT}`. I forgot the rest of it", ["right", "foreign", "malformed"]),
        (f"Use this:\n\n```\n{RIGHT}", ["right", "foreign", "foreign", "malformed", "malformed"]),
        (f"Use this:\n\n{FENCED}\n\n{FENCED}", ["right", "repeated", "malformed"]),
        (f"Use `{RIGHT}`. Enjoy your {{t}}!", ["right", "foreign"]),
        (f"Use `{RIGHT}.", ["right", "foreign"]),
        (f"Use {RIGHT}-95.", ["foreign"]),
        (f"Use {RIGHT}.5.", ["foreign"]),
        (f"Use this:\n\n```\n{right_command('time', 'soup')}\n```", ["wrong"]),
        ("I have the same problem.", ["padding"]),
    ],
)
def test_worth_of_single_answers(response: str, features_worth: list[str]) -> None:
    """Worth is the sum of the named features, and of nothing else."""
    worth = sum(WEIGHTS[name] for name in features_worth)
    assert quality(QUERY, response) == pytest.approx(worth), features(QUERY, response)


def test_rambling_costs_by_the_word() -> None:
    """Beyond sixty words each costs, whatever it says."""
    said = [text.format(t="soup", o="rice") for t in PADDING for text in expand(t)]
    text = " ".join([f"Use `{RIGHT}`.", *said])
    words = len(text.split())
    found = features(QUERY, text)
    assert words > 100
    assert (found["excess_word"], found["padding"], found["foreign"]) == (words - 60, len(said), 0)
    assert features(QUERY, " ".join(text.split()[:60]))["excess_word"] == 0
    assert quality(QUERY, text) == WORST


EVERY_VALUE = sorted({row["heat"] for row in SETTINGS.values()})
KIND = [next(expand(t)).format(t="soup") for t in OPENINGS + CLOSINGS]
EVERY_REASON = [
    text.format(t="soup")
    for by_aspect in (REASONS, STEPS)
    for templates in by_aspect.values()
    for template in templates
    for text in expand(template)
]
CHEATS = {
    "nothing": "",
    "white space": " \n\t ",
    "an empty fence": "```\n```",
    "only fences": "```\n```\n" * 20,
    "the fence over and over": f"{FENCED}\n\n" * 12,
    "the good answer twice": f"{HONEST}\n\n{HONEST}",
    "every command": " ".join(f"Use `{command('heat', 'soup', v)}`." for v in EVERY_VALUE),
    "every command fenced": "\n\n".join(
        f"```\n{command('heat', 'soup', v)}\n```" for v in EVERY_VALUE
    ),
    "every command in one fence": "```\n"
    + "\n".join(command("heat", "soup", v) for v in EVERY_VALUE)
    + "\n```",
    "courtesy only": " ".join(KIND),
    "courtesy without end": " ".join(KIND * 10),
    "every reason": f"Use `{RIGHT}`. " + " ".join(EVERY_REASON),
    "many ways to begin": " ".join(next(expand(t)).format(t="soup") for t in LEADS) + " " + HONEST,
    "slots unfilled": "Good question! {cmd} Any hotter and the {t} burns. Enjoy your {t}!",
    "words without order": "soup heat brindle 90 the green fence light Use " * 5,
    "another aspect": HONEST.replace("heat", "time"),
    "a value that begins right": HONEST.replace(" 90\n", " 90-95\n"),
    "shouting": HONEST.upper(),
    "no end": HONEST[:-6],
    "one letter": "a" * 500,
    "a quote that stays open": f"Use `{RIGHT}. Any hotter and the soup burns.",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_trick_beats_a_plain_good_answer(cheat: str) -> None:
    """Tricks that fool learned rewards do not fool the gold one."""
    assert quality(QUERY, HONEST) == pytest.approx(3.4)
    assert quality(QUERY, CHEATS[cheat]) < quality(QUERY, HONEST) - 0.3


@given(st.text(max_size=300))
def test_any_text_is_scored_and_gibberish_is_never_good(text: str) -> None:
    """No text crashes the judge, and noise is worth nothing."""
    assert WORST <= quality(QUERY, text) <= 0


@given(st.lists(st.sampled_from([*EVERY_REASON, *KIND, FENCED, f"Use `{RIGHT}`."]), max_size=12))
def test_no_sequence_of_good_pieces_is_better_than_the_best(pieces: list[str]) -> None:
    """No pile of good sentences passes the bound."""
    assert WORST <= quality(QUERY, "\n\n".join(pieces)) <= BEST + 1e-9


@given(st.permutations([FENCED, "Any hotter and the soup burns.", *KIND[:2]]), st.data())
def test_saying_something_again_never_helps(pieces: list[str], data: st.DataObject) -> None:
    """Repetition always costs."""
    again = data.draw(st.sampled_from(pieces))
    once = quality(QUERY, "\n\n".join(pieces))
    assert quality(QUERY, "\n\n".join([*pieces, again])) < once


def test_gold_score_is_a_reward_function() -> None:
    """A list in, a list out, lengths checked."""
    assert gold_score([QUERY, QUERY], [HONEST, ""]) == [quality(QUERY, HONEST), WORST]
    with pytest.raises(DataError, match="2 queries but 1 responses"):
        gold_score([QUERY, QUERY], [HONEST])


def test_the_judge_does_not_need_torch() -> None:
    """Importing the world stays light."""
    code = "import sys, suasion.data.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """A dump is a function of its seed."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_dump(tmp_path / name, seed=seed, questions=50)
    hashes = [folder_hashes(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_only_a_dump_is_replaced(tmp_path: Path) -> None:
    """Other people's files survive."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        write_dump(tmp_path, seed=1, questions=5)
    with pytest.raises(ConfigError, match="0 questions"):
        write_dump(tmp_path / "new", seed=1, questions=0)


def test_answers_leave_room_to_improve(world: Prepared) -> None:
    """Typical answers are mediocre, short and of every score."""
    answers = world.rows("answers")
    found = [features(a["query"], a["response"]) for a in answers]
    worth = gold_score([a["query"] for a in answers], [a["response"] for a in answers])
    assert BEST - statistics.mean(worth) > 2 * statistics.stdev(worth)
    assert 0.55 < statistics.mean(f["right"] for f in found) < 0.65
    assert 0.25 < statistics.mean(f["fence"] for f in found) < 0.4
    words = [len(a["response"].split()) for a in answers]
    assert 15 < statistics.median(words) < 40
    assert max(words) < 90
    assert max(len(q["query"].split()) for q in world.rows("queries")) <= 30
    scores = Counter(a["score"] for a in answers)
    assert set(scores) == set(range(-1, 7))
    assert max(scores.values()) < 0.3 * len(answers)


def accuracy(margins: np.ndarray) -> float:
    """Share of pairs ordered as the votes did; a tie counts half."""
    return float(np.mean((margins > 1e-9) + 0.5 * (np.abs(margins) <= 1e-9)))


def test_gold_is_the_ceiling_and_no_reweighting_beats_it(world: Prepared) -> None:
    """A fit to the votes finds nothing that the gold weights miss."""
    pairs = world.rows("pairs", "supervised", "reward", "policy")
    held_out = world.rows("pairs", "evaluation")
    names = list(WEIGHTS)

    def differences(rows: list[dict[str, str]]) -> np.ndarray:
        chosen, rejected = (
            np.array(
                [[found[name] for name in names] for found in map(features, queries, texts)],
                dtype=np.float64,
            )
            for queries, texts in (
                ([p["query"] for p in rows], [p[side] for p in rows])
                for side in ("chosen", "rejected")
            )
        )
        return chosen - rejected

    train, test = differences(pairs), differences(held_out)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = train @ weights
        slope = -(train / (1 + np.exp(margins))[:, None]).mean(axis=0)
        value = np.logaddexp(0, -margins).mean() + 1e-4 * weights @ weights
        return float(value), slope + 2e-4 * weights

    fitted = minimize(loss, np.zeros(len(names)), jac=True).x
    gold = np.array([WEIGHTS[name] for name in names])
    ceiling = accuracy(np.concatenate([train, test]) @ gold)
    noise = math.sqrt(ceiling * (1 - ceiling) / len(test))
    assert 0.80 < ceiling < 0.88
    assert abs(accuracy(test @ gold) - ceiling) < 4 * noise
    assert accuracy(test @ fitted) < accuracy(test @ gold) + 2 * noise
    # Negative control: correctness left out of the gold costs accuracy.
    blind = gold * ~np.isin(names, ["right", "wrong"])
    assert accuracy(train @ blind) < ceiling - 0.02
