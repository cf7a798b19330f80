"""The sentences of the small world.

A template writes alternatives as `(one|other)`. `{t}` is the dish a question is about, `{o}` some
other dish, `{cmd}` a command. The language is finite on purpose: every sentence that may be written
can be listed, so text outside of it is recognised as such.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import product
from typing import Final

from suasion.data.world.facts import SITE

_ALTERNATIVES: Final = re.compile(r"\(([^()]*\|[^()]*)\)")

TITLES: Final[dict[str, tuple[str, ...]]] = {
    "heat": (
        "(What|Which) temperature (is right|should I use) for {t}?",
        "How hot should brindle (get|be) for {t}?",
        "My {t} (burns|boils over), what temperature is right?",
        "(Right|Best) heat for {t}",
    ),
    "time": (
        "(What|Which) timer setting (is right|should I use) for {t}?",
        "How do I set the timer for {t}?",
        "The timer (stops too early|runs too long) with {t}",
        "(Right|Best) timer value for {t}",
    ),
    "lid": (
        "(What|Which) lid position (is right|should I use) for {t}?",
        "How do I set the lid for {t}?",
        "Brindle (drips|spits) with {t}, is the lid wrong?",
        "(Right|Best) position of the lid for {t}",
    ),
    "rest": (
        "How long should {t} rest?",
        "(What|Which) rest (is right|should I use) for {t}?",
        "My {t} falls apart, does it need a (longer|shorter) rest?",
        "(Right|Best) rest for {t} after cooking",
    ),
}
"""Titles by aspect. Each names its dish and one of its aspect's cue words, and no other's."""

CUES: Final[dict[str, frozenset[str]]] = {
    "heat": frozenset({"temperature", "hot", "heat"}),
    "time": frozenset({"timer"}),
    "lid": frozenset({"lid"}),
    "rest": frozenset({"rest"}),
}

BODIES: Final = (
    "I (tried|used) {wrong} and it was (no good|a mess).",
    "Someone told me {wrong} but I doubt it.",
    "With {o} it (works|goes) well, so brindle is not broken.",
    "I am new to brindle and (could not find it|do not want to break it).",
    "(It went wrong|It failed) (twice|three times) this week.",
    "I cook for (two|four|six) people.",
    f"I read [the manual](https://{SITE}/manual) (twice|and found nothing).",
    "My (aunt|uncle|neighbour) does it by hand.",
    "Please explain why, (if you can|if there is a reason).",
    "It used to work before the (last update|move to the new kitchen).",
    "The {o} I made (yesterday|last week) was perfect.",
)

LEADS: Final = (
    "(Use|Run|Type|Enter) this:",
    "The (command|line) you need is:",
    "This is the (right|proper) setting for {t}:",
)

INLINE: Final = (
    "(Use|Run|Type|Enter) {cmd}.",
    "The (command|line) you need is {cmd}.",
    "I always (use|run) {cmd} myself.",
)

VAGUE: Final = (
    "(Just try|Try) a few values until it works.",
    "It depends on your (kitchen|pot).",
    "(Look it up|You will find it) in the manual.",
    "I have the same problem.",
)

REASONS: Final[dict[str, tuple[str, ...]]] = {
    "heat": (
        "Any hotter and the {t} (burns|sticks).",
        "Below that the {t} stays (cold|raw) in the middle.",
        "At that heat the {t} keeps its (colour|taste).",
    ),
    "time": (
        "(After that|Any longer and) the {t} loses its taste.",
        "The {t} needs that long to (thicken|cook through).",
        "The bell would ring too soon for {t} (with less|otherwise).",
    ),
    "lid": (
        "That way the steam (leaves|stays in) the pot as {t} needs.",
        "Otherwise the {t} (foams|dries out) under the lid.",
        "The {t} (keeps|gets) its crust only like that.",
    ),
    "rest": (
        "The {t} (settles|sets) while it stands.",
        "Served sooner, the {t} (falls apart|is too hot).",
        "The taste of {t} (comes|grows) in that time.",
    ),
}

STEPS: Final[dict[str, tuple[str, ...]]] = {
    "heat": (
        "Let it warm up before you add the {t}.",
        "Then wait for the green (light|lamp).",
        "Lower it a little once the {t} moves.",
    ),
    "time": (
        "Stay close for the last minute.",
        "Then listen for the (bell|second bell).",
        "Begin to count when the {t} is warm.",
    ),
    "lid": (
        "Turn the lid until it clicks.",
        "Then wipe the (rim|glass) dry.",
        "Check it again when the {t} boils.",
    ),
    "rest": (
        "Keep it covered meanwhile.",
        "Then stir once and serve the {t}.",
        "Move the {t} away from the (fan|window).",
    ),
}

OPENINGS: Final = (
    "(Good|Nice) question!",
    "Welcome, and (thanks|thank you) for asking!",
    "(Happy|Glad) to help.",
)
CLOSINGS: Final = (
    "(Hope this helps|I hope this helps)!",
    "Enjoy your {t}!",
    "(Good luck|All the best) with the {t}!",
)
RUDE: Final = (
    "(Did you even|Can you not) read the manual?",
    "This is (obvious|trivial), really.",
    "Only a fool would ask (this|that).",
    "Stop wasting our time.",
    "(Next time|Please) think before you write.",
)
PADDING: Final = (
    "I have (owned|used) brindle for (years|ages) now.",
    "My (aunt|uncle|neighbour) makes {o} on Sundays.",
    "(There are|I hear) many opinions about this.",
    "I like {o} better than {t} anyway.",
    "The weather may play a part as well.",
    "As far as I know it was always like this.",
    "Some people (say|claim) the older model was better.",
    "Then again, {o} and {t} are not that different.",
    "I wrote about this somewhere else too, but I (forgot|forget) where.",
    "My first {t} took me (a whole day|half the night).",
    "People in my town eat {o} all year.",
)
LINKS: Final = (f"See [the manual](https://{SITE}/manual) for more.",)


def expand(template: str) -> Iterator[str]:
    """Every sentence that a template's alternatives allow; slots stay."""
    parts = _ALTERNATIVES.split(template)
    for choice in product(*(part.split("|") for part in parts[1::2])):
        yield "".join(text for pair in zip(parts[::2], (*choice, ""), strict=True) for text in pair)


def write(templates: tuple[str, ...], random: random.Random, **slots: str) -> str:
    """One sentence: a template drawn, its alternatives drawn, its slots filled."""
    text = _ALTERNATIVES.sub(
        lambda match: random.choice(match[1].split("|")), random.choice(templates)
    )
    return text.format(**slots)
