"""One question with its answers: texts, scores, pairs, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suasion.core.errors import DataError
from suasion.data.markup import to_markdown
from suasion.data.scoring import choose_pairs, count_unequal, split_of, vote_score

Post = dict[str, Any]
"""A row of `spill.POST_SCHEMA`, with its `author`."""


@dataclass(frozen=True)
class Rules:
    """What decides which rows a thread gives.

    Attributes:
        site: Host name, part of every link and of every hash.
        seed: Part of every hash.
        max_pairs: The most pairs a question may give.
        fractions: Share of the questions per split.
    """

    site: str
    seed: int
    max_pairs: int
    fractions: Mapping[str, float]


@dataclass
class Thread:
    """Rows for the tables of one split, and what was left out.

    Attributes:
        split: The split that all rows belong to; empty if there are none.
        rows: Rows by table name.
        orphans: Answers left out because their question is not in the dump.
        empty: Posts left out because they hold no text.
        pairs_unequal: Pairs with unequal scores, before `max_pairs`.
    """

    split: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    orphans: int = 0
    empty: int = 0
    pairs_unequal: int = 0


def assemble(posts: list[Post], rules: Rules, source: Path) -> Thread:
    """Join a question and its answers.

    Args:
        posts: All posts of one question: the question first, if it is there, then answers by id.
        rules: Splits and pairs.
        source: The file they are from, for messages.

    Raises:
        DataError: a body cannot be converted.
    """
    question, *replies = posts
    if not question["is_question"]:
        return Thread(orphans=len(posts))
    question_id = question["question_id"]
    query = "\n\n".join(text for text in (question["title"], _markdown(question, source)) if text)
    if not query:
        return Thread(empty=len(posts))
    origin = {
        "query": query,
        "question_id": question_id,
        "site": rules.site,
        "link": f"https://{rules.site}/questions/{question_id}",
    }
    credit = {"author": question["author"], "licence": question["licence"]}
    answers = [a for a in (_answer(question, reply, source) for reply in replies) if a["response"]]
    best = max(answers, key=lambda a: (a["score"], a["votes"], -a["answer_id"]), default=None)
    scores = [answer["score"] for answer in answers]
    chosen = choose_pairs(
        scores,
        [answer["answer_id"] for answer in answers],
        max_pairs=rules.max_pairs,
        key=(rules.seed, rules.site, question_id),
    )
    return Thread(
        split=split_of(question_id, site=rules.site, seed=rules.seed, fractions=rules.fractions),
        rows={
            "queries": [origin | credit],
            "answers": [origin | answer | {"best": answer is best} for answer in answers],
            "pairs": [origin | _pair(question, answers[i], answers[j]) for i, j in chosen],
        },
        empty=len(replies) - len(answers),
        pairs_unequal=count_unequal(scores),
    )


def _answer(question: Post, reply: Post, source: Path) -> dict[str, Any]:
    accepted = question["accepted_id"] == reply["post_id"]
    return {
        "response": _markdown(reply, source),
        "score": vote_score(reply["votes"], accepted=accepted),
        "votes": reply["votes"],
        "accepted": accepted,
        "answer_id": reply["post_id"],
        "author": reply["author"],
        "licence": reply["licence"],
    }


def _pair(question: Post, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    licences = {question["licence"], chosen["licence"], rejected["licence"]}
    return {
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "chosen_id": chosen["answer_id"],
        "rejected_id": rejected["answer_id"],
        "chosen_author": chosen["author"],
        "rejected_author": rejected["author"],
        "licence": "; ".join(sorted(licences)),
    }


def _markdown(post: Post, source: Path) -> str:
    try:
        return to_markdown(post["body"])
    except ValueError as error:
        raise DataError(
            f"{source}, line {post['line']}: body of post {post['post_id']}: {error}",
            "correct or remove the row",
        ) from None
