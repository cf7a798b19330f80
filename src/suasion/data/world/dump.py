"""The small world in the format of a Stack Exchange dump."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from suasion.core.errors import ConfigError
from suasion.core.files import atomic_folder, write_json
from suasion.core.seeding import seed_of
from suasion.data.origin import licence_at
from suasion.data.world.compose import (
    Question,
    Text,
    as_html,
    markdown,
    write_answer,
    write_question,
)
from suasion.data.world.facts import SITE
from suasion.data.world.quality import quality

MARKER: Final = "world.json"
"""File that says how a dump was made; a folder without it is never replaced."""

VOTE_NOISE: Final = 1.0
"""Standard deviation of what moves all of an answer's voters but is not its quality."""

_START: Final = datetime(2017, 1, 1)  # UTC; dumps do not say so
_MOST_VOTERS: Final = 44
_ANSWERS: Final = (1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7)
_USERS: Final = 400
_ASKERS_WHO_ACCEPT: Final = 0.6
_SYLLABLES: Final = ("ba", "del", "fi", "gar", "ho", "kin", "lu", "mo", "nes", "ri", "sol", "ta")


@dataclass
class _Post:
    """A post on its way to the file."""

    when: datetime
    html: str
    ups: int
    downs: int
    owner: int | None
    question: _Post | None = None
    title: str = ""
    accepted: _Post | None = None
    post_id: int = 0
    answers: list[_Post] = field(default_factory=list)


def write_dump(folder: Path, *, seed: int, questions: int) -> None:
    """Write `Posts.xml`, `Votes.xml` and `Users.xml` of a small world whose truth is known.

    The same seed gives the same bytes. `Score` of every post is its up-votes minus its down-votes
    in `Votes.xml`.

    Args:
        folder: Folder to make; one that exists is replaced only if this function made it.
        seed: Decides everything.
        questions: Number of questions; each has one to seven answers.

    Raises:
        ConfigError: `questions` is below 1, or `folder` holds something else.
        StorageError: the disk refused.
    """
    if questions < 1:
        raise ConfigError(f"a small world of {questions} questions", "ask for 1 or more")
    made_here = (folder / MARKER).is_file()
    if folder.exists() and not made_here and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something else", "choose another folder, or empty it")
    posts = _posts(seed, questions)
    draw = random.Random(seed_of(seed, "world", "names"))  # noqa: S311 - a world, not a secret
    with atomic_folder(folder) as partial:
        _write(partial / "Posts.xml", "posts", map(_post_row, posts))
        _write(partial / "Votes.xml", "votes", _vote_rows(posts))
        _write(partial / "Users.xml", "users", _user_rows(draw))
        write_json(partial / MARKER, {"site": SITE, "seed": seed, "questions": questions})


def _posts(seed: int, questions: int) -> list[_Post]:
    """All posts in order of their date, numbered from 1."""
    draw = random.Random(seed_of(seed, "world", "posts"))  # noqa: S311 - a world, not a secret
    skills = [draw.random() for _ in range(_USERS)]
    posts: list[_Post] = []
    for number in range(questions):
        asked = _START + timedelta(hours=4 * number, seconds=draw.randrange(3600))
        posts.extend(_thread(write_question(draw), asked, skills, draw))
    posts.sort(key=lambda post: post.when)
    for post_id, post in enumerate(posts, start=1):
        post.post_id = post_id
    return posts


def _thread(
    question: Question, asked: datetime, skills: list[float], draw: random.Random
) -> list[_Post]:
    """A question and its answers, with votes."""
    crowd = min(_MOST_VOTERS, draw.lognormvariate(2.2, 1.0))
    ups, downs = _votes(1.5, crowd, draw)
    opening = _Post(asked, as_html(question.body), ups, downs, _owner(draw), title=question.title)
    opinions: list[tuple[float, _Post]] = []
    when = asked
    for user in draw.sample(range(_USERS), draw.choice(_ANSWERS)):
        text: Text = write_answer(question.subject, skills[user], draw)
        worth = quality(question.query(), markdown(text))
        opinion = worth + draw.gauss(0.0, VOTE_NOISE)
        ups, downs = _votes(opinion, crowd, draw)
        when += timedelta(seconds=60 + round(draw.expovariate(1 / 20_000)))
        owner = user + 1 if draw.random() < 0.97 else None
        opinions.append((opinion, _Post(when, as_html(text), ups, downs, owner, question=opening)))
    if draw.random() < _ASKERS_WHO_ACCEPT:
        opening.accepted = max(opinions, key=lambda pair: pair[0])[1]
    opening.answers = [post for _, post in opinions]
    return [opening, *opening.answers]


def _votes(opinion: float, crowd: float, draw: random.Random) -> tuple[int, int]:
    """Up- and down-votes of a post that `crowd` people see on average."""
    liked = 1 / (1 + math.exp(-0.9 * (opinion - 1.0)))
    voters = min(_MOST_VOTERS, max(0, round(draw.gauss(crowd, math.sqrt(crowd)))))
    ups = sum(draw.random() < liked for _ in range(voters))
    downs = sum(draw.random() < (1 - liked) * 0.4 for _ in range(voters - ups))
    return ups, downs


def _owner(draw: random.Random) -> int | None:
    return draw.randrange(_USERS) + 1 if draw.random() < 0.97 else None


def _write(path: Path, root: str, rows: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        file.write(f'<?xml version="1.0" encoding="utf-8"?>\r\n<{root}>\r\n')
        file.writelines(f"  <row {row} />\r\n" for row in rows)
        file.write(f"</{root}>\n")


def _attributes(**values: object) -> str:
    quote = {'"': "&quot;", "\n": "&#xA;"}
    return " ".join(
        f'{name}="{escape(str(value), quote)}"' for name, value in values.items() if value != ""
    )


def _post_row(post: _Post) -> str:
    when = post.when.isoformat(timespec="milliseconds")
    licence = licence_at(when)
    common = {
        "CreationDate": when,
        "Score": post.ups - post.downs,
        "Body": post.html,
        "OwnerUserId": "" if post.owner is None else post.owner,
        "OwnerDisplayName": "guest" if post.owner is None and post.post_id % 2 else "",
        "ContentLicense": licence if licence.endswith("4.0") else "",
    }
    if post.question is not None:
        return _attributes(Id=post.post_id, PostTypeId=2, ParentId=post.question.post_id, **common)
    return _attributes(
        Id=post.post_id,
        PostTypeId=1,
        AcceptedAnswerId=post.accepted.post_id if post.accepted else "",
        **common,
        Title=post.title,
        Tags="<brindle>",
        AnswerCount=len(post.answers),
    )


def _vote_rows(posts: list[_Post]) -> Iterable[str]:
    number = 0
    for post in posts:
        accepted = post.question is not None and post.question.accepted is post
        for kind in [2] * post.ups + [3] * post.downs + [1] * accepted:
            number += 1
            yield f'Id="{number}" PostId="{post.post_id}" VoteTypeId="{kind}"'


def _user_rows(draw: random.Random) -> Iterable[str]:
    for number in range(1, _USERS + 1):
        first, last = (
            "".join(draw.choice(_SYLLABLES) for _ in range(2)).capitalize() for _ in range(2)
        )
        yield _attributes(Id=number, DisplayName=f"{first} {last}")
