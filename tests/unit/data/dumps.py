"""Small dumps written by hand, and a second, slower way to count what is in a dump."""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

HEAD = '\ufeff<?xml version="1.0" encoding="utf-8"?>\r\n<posts>\n'
TAIL = "</posts>\n"


def question(post_id: int, more: str = "", *, title: str = "Why?", body: str = "<p>So.</p>") -> str:
    """A question's row."""
    return (
        f'  <row Id="{post_id}" PostTypeId="1" Score="0" Title="{html.escape(title)}" '
        f'Body="{html.escape(body)}" {more}/>\n'
    )


def answer(
    post_id: int, parent: int, score: int = 1, more: str = "", *, body: str = "<p>Yes.</p>"
) -> str:
    """An answer's row."""
    return (
        f'  <row Id="{post_id}" PostTypeId="2" ParentId="{parent}" Score="{score}" '
        f'Body="{html.escape(body)}" {more}/>\n'
    )


def threads(count: int) -> list[str]:
    """Rows of `count` questions with two answers each, of scores 1 and 3."""
    rows = []
    for q in range(1, 3 * count, 3):
        rows += [
            question(q, title=f"Question {q}"),
            answer(q + 1, q, 1),
            answer(q + 2, q, 9, body=f"<p>Answer {q + 2}</p>"),
        ]
    return rows


def write_posts(folder: Path, rows: Iterable[str], *, head: str = HEAD, tail: str = TAIL) -> Path:
    """Write `Posts.xml` into a new folder."""
    folder.mkdir(parents=True)
    (folder / "Posts.xml").write_text(head + "".join(rows) + tail, encoding="utf-8", newline="")
    return folder


@dataclass(frozen=True)
class Recount:
    """What a dump holds, counted without any code of the package."""

    questions: int
    answers: int
    pairs_unequal: int
    pairs: int
    scores: dict[int, int]
    parents: dict[int, int]


def attributes(path: Path) -> Iterable[dict[str, str]]:
    """Attributes of each row by regular expression; the files hold one row per line."""
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.lstrip().startswith("<row "):
            yield {
                name: html.unescape(value) for name, value in re.findall(r'(\w+)="([^"]*)"', line)
            }


def recount(posts: Path, max_pairs: int = 10) -> Recount:
    """Count pairs the long way: thresholds instead of logarithms, all pairs listed."""
    accepted = set()
    replies: dict[int, list[tuple[int, int]]] = defaultdict(list)
    questions = set()
    for row in attributes(posts):
        if row["PostTypeId"] == "1":
            questions.add(int(row["Id"]))
            accepted.add(int(row.get("AcceptedAnswerId", "0")))
        elif row["PostTypeId"] == "2":
            replies[int(row["ParentId"])].append((int(row["Id"]), int(row["Score"])))

    def score(post_id: int, votes: int) -> int:
        # 1 + votes is at or above 2^(k - 1/2) for k = the rounded logarithm.
        steps = sum((1 + votes) ** 2 >= 2 ** (2 * k - 1) for k in range(1, 40)) if votes > 0 else 0
        return -1 if votes < 0 else steps + (post_id in accepted)

    scores = {i: score(i, v) for thread in replies.values() for i, v in thread}
    per_question = [
        sum(scores[a] != scores[b] for (a, _), (b, _) in combinations(replies[q], 2))
        for q in questions
    ]
    return Recount(
        questions=len(questions),
        answers=sum(map(len, replies.values())),
        pairs_unequal=sum(per_question),
        pairs=sum(min(max_pairs, n) for n in per_question),
        scores=scores,
        parents={i: q for q, thread in replies.items() for i, _ in thread},
    )


def log_table() -> dict[int, int]:
    """First vote count of each score, from the definition of rounding."""
    return {math.ceil(2 ** (k - 0.5)) - 1: k for k in range(1, 12)}
