"""The hidden truth about an answer's worth, read off its text.

Votes in the small world are drawn from `quality`, and nothing else about an answer moves them: it
is the best that any reward model can learn, and no re-weighting of it can order pairs better.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from suasion.core.errors import DataError
from suasion.data.world import grammar
from suasion.data.world.facts import ASPECTS, DISHES, right_command

WORST: Final = -4.0
"""No answer is worse than this; an empty one is this bad."""

WEIGHTS: Final[dict[str, float]] = {
    "right": 1.2,
    "wrong": -0.8,
    "fence": 1.2,
    "reason": 1.0,
    "step": 0.8,
    "opening": 0.5,
    "closing": 0.5,
    "rude": -1.2,
    "padding": -0.4,
    "repeated": -0.8,
    "foreign": -0.6,
    "malformed": -0.8,
    "excess_word": -0.05,
}
"""What each feature of an answer adds; see `features` for their meaning."""

BEST: Final = sum(weight for weight in WEIGHTS.values() if weight > 0)
"""Quality of the best possible answer."""

_LONG: Final = 60
"""Words after which an answer rambles."""

# A command ends where its word ends: `... 90.5` and `... 90-95` are no commands.
_COMMAND: Final = re.compile(
    rf"(?<![\w-])brindle (?:{'|'.join(ASPECTS)}) (?:{'|'.join(DISHES)}) [a-z0-9]+(?![\w-]|\.\w)"
)
_QUOTED: Final = re.compile(rf"`{_COMMAND.pattern}`|(?<!`){_COMMAND.pattern}(?!`)")
_FENCE: Final = re.compile(r"^```[a-z]*\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
_DISH: Final = re.compile(rf"\b({'|'.join(DISHES)})\b")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?:])\s+|\n+")
_USEFUL_ONCE: Final = frozenset({"lead", "reason", "step", "opening", "closing", "link"})
_NOT_OURS: Final = str.maketrans("{}\0", "???")
_PREFIX: Final = re.compile(r"\AQuestion: ")


@dataclass(frozen=True)
class Subject:
    """What a question is about."""

    aspect: str
    dish: str


def subject_of(query: str) -> Subject:
    """Aspect and dish of a question, from its first line.

    Args:
        query: The question, with or without the `Question: ` of the template before it.

    Raises:
        DataError: the first line does not name one aspect and one dish of the small world.
    """
    title = _PREFIX.sub("", query.strip()).partition("\n")[0].lower()
    words = set(re.findall(r"[a-z]+", title))
    aspects = [aspect for aspect, cues in grammar.CUES.items() if cues & words]
    dishes = [dish for dish in DISHES if dish in words]
    if len(aspects) != 1 or len(dishes) != 1:
        raise DataError(
            f"not a question of the small world: {title[:80]!r}",
            "the gold score knows only questions written by suasion.data.world; "
            "use another reward for your own data",
        )
    return Subject(aspects[0], dishes[0])


def _known_sentences() -> dict[str, tuple[str, str | None]]:
    """Role, and aspect if it has one, of every sentence an answer may hold."""
    plain = {
        "lead": grammar.LEADS + grammar.INLINE,
        "vague": grammar.VAGUE,
        "opening": grammar.OPENINGS,
        "closing": grammar.CLOSINGS,
        "rude": grammar.RUDE,
        "padding": grammar.PADDING,
        "link": grammar.LINKS,
    }
    known: dict[str, tuple[str, str | None]] = {
        text: (role, None)
        for role, templates in plain.items()
        for template in templates
        for text in grammar.expand(template)
    }
    for role, by_aspect in (("reason", grammar.REASONS), ("step", grammar.STEPS)):
        for aspect, templates in by_aspect.items():
            for template in templates:
                known.update(dict.fromkeys(grammar.expand(template), (role, aspect)))
    return known


_KNOWN: Final = _known_sentences()


def features(query: str, response: str) -> Counter[str]:
    """Count what matters in an answer.

    Returns:
        Counts by name. At most one each of: `right` (the right command and no wrong one), `fence`
        (one well-formed code block with one command about the question's aspect and dish),
        `reason` and `step` (a sentence that explains, or goes on, about the question's aspect),
        `opening` and `closing` (courtesy), `lead` and `link` (worth nothing). Any number of:
        `wrong` (other commands), `rude`, `padding` (sentences that say nothing, or a second of what
        is useful once), `repeated` (sentences or
        commands said before), `foreign` (sentences outside the language), `malformed` (code blocks
        that are open, empty or one too many; an end in mid-sentence), `excess_word`.
    """
    subject = subject_of(query)
    text = response.strip()
    found: Counter[str] = Counter()
    _count_commands(text, subject, found)
    prose = _count_fences(text, subject, found)
    _count_sentences(prose, subject, found)
    found["malformed"] += not text.endswith((".", "!", "?", "```"))
    found["excess_word"] = max(0, len(text.split()) - _LONG)
    return found


def _count_commands(text: str, subject: Subject, found: Counter[str]) -> None:
    commands = Counter(_COMMAND.findall(text))
    right = right_command(subject.aspect, subject.dish)
    found["wrong"] = len(commands.keys() - {right})
    found["right"] = int(set(commands) == {right})
    found["repeated"] += sum(commands.values()) - len(commands)


def _count_fences(text: str, subject: Subject, found: Counter[str]) -> str:
    """Judge the code blocks and return the text without them."""
    blocks = _FENCE.findall(text)
    about = f"brindle {subject.aspect} {subject.dish} "
    commands = [block for block in blocks if _COMMAND.fullmatch(block)]
    found["fence"] = int(len(blocks) == 1 == len(commands) and blocks[0].startswith(about))
    found["malformed"] += len(blocks) - min(1, len(commands))
    prose = _FENCE.sub("\n", text)
    found["malformed"] += "```" in prose
    return prose


def _count_sentences(prose: str, subject: Subject, found: Counter[str]) -> None:
    said: set[str] = set()
    for line in _SENTENCE_END.split(prose):
        sentence = line.removeprefix("- ").strip()
        if not sentence:
            continue
        form = _form(sentence, subject.dish)
        role, aspect = _KNOWN.get(form, ("foreign", None))
        if form in said:
            found["repeated"] += 1
        elif role in _USEFUL_ONCE:
            useful = aspect in (None, subject.aspect) and not found[role]
            found[role if useful else "padding"] += 1
        else:
            found["padding" if role == "vague" else role] += 1
        said.add(form)


def _form(sentence: str, dish: str) -> str:
    """The sentence with its slots put back: the key of `_KNOWN`."""
    # Braces that are in the text already are none of ours.
    text = _QUOTED.sub("\0", sentence.translate(_NOT_OURS))
    text = _DISH.sub(lambda match: "{t}" if match[1] == dish else "{o}", text)
    return text.replace("\0", "{cmd}")


def quality(query: str, response: str) -> float:
    """Worth of an answer to a question of the small world, in `[WORST, BEST]`.

    Args:
        query: The question as prepared: title, blank line, Markdown body.
        response: The answer's Markdown; any text whatever is scored.

    Raises:
        DataError: the query is not a question of the small world.
    """
    if not response.strip():
        return WORST
    found = features(query, response)
    return max(WORST, sum(weight * found[name] for name, weight in WEIGHTS.items()))


def gold_score(queries: Sequence[str], responses: Sequence[str]) -> list[float]:
    """`quality` of each response; a reward function, `suasion.data.world:gold_score` by its path.

    Raises:
        DataError: a query is not a question of the small world, or the lengths differ.
    """
    if len(queries) != len(responses):
        raise DataError(f"{len(queries)} queries but {len(responses)} responses")
    return [quality(query, response) for query, response in zip(queries, responses, strict=True)]
