"""Questions and answers of the small world as blocks, and those as Markdown or HTML."""

from __future__ import annotations

import html
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from suasion.data.world import grammar
from suasion.data.world.facts import ASPECTS, DISHES, SETTINGS, command, right_command
from suasion.data.world.quality import Subject

_LINK: Final = re.compile(r"\[([^]]*)\]\(([^)]*)\)")
_CODE: Final = re.compile(r"`([^`]*)`")


@dataclass(frozen=True)
class Block:
    """A paragraph, a code block or a list."""

    kind: Literal["text", "code", "list"]
    lines: tuple[str, ...]

    def markdown(self) -> str:
        """The block as Markdown."""
        if self.kind == "code":
            return "\n".join(["```", *self.lines, "```"])
        mark = "- " if self.kind == "list" else ""
        return "\n".join(mark + line for line in self.lines)

    def html(self) -> str:
        """The block as the site would have stored it."""
        if self.kind == "code":
            return f"<pre><code>{html.escape(chr(10).join(self.lines), quote=False)}\n</code></pre>"
        lines = [
            _LINK.sub(
                r'<a href="\2">\1</a>',
                _CODE.sub(r"<code>\1</code>", html.escape(line, quote=False)),
            )
            for line in self.lines
        ]
        if self.kind == "list":
            return "<ul>\n" + "".join(f"<li>{line}</li>\n" for line in lines) + "</ul>"
        return "<p>" + "\n".join(lines) + "</p>"


Text = tuple[Block, ...]


def markdown(text: Text) -> str:
    """Blocks as Markdown, as `data.markup.to_markdown` would give it back."""
    return "\n\n".join(block.markdown() for block in text)


def as_html(text: Text) -> str:
    """Blocks as the HTML body of a post."""
    return "\n\n".join(block.html() for block in text) + "\n"


@dataclass(frozen=True)
class Question:
    """A question: what it is about, and its text."""

    subject: Subject
    title: str
    body: Text

    def query(self) -> str:
        """The text that models see."""
        return "\n\n".join(part for part in (self.title, markdown(self.body)) if part)


def write_question(random: random.Random) -> Question:
    """Draw a question: a dish, an aspect, a way to put it and, mostly, a sentence of context."""
    subject = Subject(random.choice(ASPECTS), random.choice(DISHES))
    slots = {"t": subject.dish, "o": _other(subject.dish, random)}
    title = grammar.write(grammar.TITLES[subject.aspect], random, **slots)
    body: Text = ()
    if random.random() < 0.8:
        wrong = f"`{_wrong_command(subject, random)}`"
        body = (Block("text", (grammar.write(grammar.BODIES, random, wrong=wrong, **slots),)),)
    return Question(subject, title, body)


def write_answer(subject: Subject, skill: float, random: random.Random) -> Text:
    """Draw an answer.

    Args:
        subject: What the question is about.
        skill: 0 to 1; the more, the more often right, complete, tidy and polite.
        random: Where draws come from.
    """

    def say(templates: tuple[str, ...], **more: str) -> str:
        slots = {"t": subject.dish, "o": _other(subject.dish, random)}
        return grammar.write(templates, random, **slots, **more)

    before: list[str] = []
    after: list[str] = []
    manner = random.random()
    if manner < 0.12 + 0.25 * skill:
        before.append(say(grammar.OPENINGS))
    elif manner > 0.75 + 0.25 * skill:
        (before if random.random() < 0.5 else after).append(say(grammar.RUDE))
    if random.random() < 0.25:
        before.append(say(grammar.PADDING))
    details = []
    if random.random() < 0.15 + 0.5 * skill:
        details.append(say(grammar.REASONS[subject.aspect]))
    if random.random() < 0.05 + 0.5 * skill:
        details.append(say(grammar.STEPS[subject.aspect]))
    listed = len(details) == 2 and random.random() < 0.12
    rambling = _distinct(
        lambda: say(grammar.PADDING), random.choice((0, 0, 0, 0, 0, 1, 1, 2, 4)), before
    )
    closing = [say(grammar.CLOSINGS)] if random.random() < 0.05 + 0.25 * skill else []
    if random.random() < 0.04:
        closing.insert(0, say(grammar.LINKS))
    blocks = _instruction(subject, skill, before, random)
    if listed:
        blocks.append(Block("list", tuple(details)))
        details = []
    after = [*details, *after, *rambling, *closing]
    if after and blocks[-1].kind == "text":
        blocks[-1] = Block("text", (" ".join([*blocks[-1].lines, *after]),))
    elif after:
        blocks.append(Block("text", (" ".join(after),)))
    return tuple(blocks)


def _instruction(
    subject: Subject, skill: float, before: list[str], random: random.Random
) -> list[Block]:
    """What to do, after the sentences `before`: a command in a block, in a line, bare, or none."""
    slots = {"t": subject.dish}
    if random.random() < 0.12 - 0.08 * skill:
        return [Block("text", (" ".join([*before, grammar.write(grammar.VAGUE, random)]),))]
    right = random.random() < 0.35 + 0.6 * skill
    line = right_command(subject.aspect, subject.dish) if right else _wrong_command(subject, random)
    style = random.random()
    if style < 0.2 + 0.45 * skill:
        lead = grammar.write(grammar.LEADS, random, **slots)
        return [Block("text", (" ".join([*before, lead]),)), Block("code", (line,))]
    shown = f"`{line}`" if style < 0.8 else line
    inline = grammar.write(grammar.INLINE, random, cmd=shown)
    return [Block("text", (" ".join([*before, inline]),))]


def best_answer(subject: Subject, random: random.Random) -> Text:
    """One of the answers that nothing can improve; tests and reports compare with it."""
    slots = {"t": subject.dish, "o": _other(subject.dish, random)}

    def say(templates: tuple[str, ...]) -> str:
        return grammar.write(templates, random, **slots)

    end = (grammar.REASONS[subject.aspect], grammar.STEPS[subject.aspect], grammar.CLOSINGS)
    return (
        Block("text", (f"{say(grammar.OPENINGS)} {say(grammar.LEADS)}",)),
        Block("code", (right_command(subject.aspect, subject.dish),)),
        Block("text", (" ".join(say(templates) for templates in end),)),
    )


def _wrong_command(subject: Subject, random: random.Random) -> str:
    """Mostly the answer to another question about the dish, sometimes another dish's value."""
    if random.random() < 0.85:
        aspect = random.choice([other for other in ASPECTS if other != subject.aspect])
        return right_command(aspect, subject.dish)
    right = SETTINGS[subject.dish][subject.aspect]
    values = sorted({row[subject.aspect] for row in SETTINGS.values()} - {right})
    return command(subject.aspect, subject.dish, random.choice(values))


def _distinct(draw: Callable[[], str], count: int, said: list[str]) -> list[str]:
    """Draw `count` sentences, leaving out those already said."""
    drawn = dict.fromkeys(draw() for _ in range(count))
    return [sentence for sentence in drawn if sentence not in said]


def _other(dish: str, random: random.Random) -> str:
    return random.choice([other for other in DISHES if other != dish])
