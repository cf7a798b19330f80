"""From a Stack Exchange dump to the tables that every later stage reads.

Two passes, both in bounded memory. The first streams `Posts.xml` and puts the few fields that
matter aside, in bucket files by question; the second takes one bucket at a time, joins answers to
their question, scores them, forms pairs and writes Parquet. Which split a question is in, which of
its pairs are kept and in which order rows come out are functions of ids and the seed only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from suasion.core.errors import ConfigError, DataError
from suasion.core.files import atomic_folder
from suasion.core.seeding import seed_of
from suasion.data.dump import Row, rows
from suasion.data.origin import checked_site, licence_at, site_of
from suasion.data.scoring import SPLITS, check_fractions
from suasion.data.sets import SCHEMAS, SplitWriters
from suasion.data.spill import IdSet, NameStore, PostSpill
from suasion.data.threads import Post, Rules, Thread, assemble

BUCKET_BYTES: Final = 64 << 20
"""XML per bucket: what the second pass holds in memory at a time, give or take a large question."""

_QUESTION, _ANSWER = 1, 2
_NEEDED: Final = {
    "supervised": ("answers",),
    "reward": ("pairs",),
    "policy": ("queries",),
    "evaluation": ("queries", "pairs"),
}
"""What the later stages read from each split."""
Progress = Callable[[int, int], None]


@dataclass
class _Tally:
    """What the passes count as they go."""

    questions: int = 0
    answers: int = 0
    orphans: int = 0
    empty: int = 0
    several: int = 0
    pairs_unequal: int = 0

    def add(self, thread: Thread) -> None:
        """Count what a thread gave and what was left out of it."""
        self.orphans += thread.orphans
        self.empty += thread.empty
        self.several += len(thread.rows.get("answers", ())) > 1
        self.pairs_unequal += thread.pairs_unequal


@dataclass(frozen=True)
class Counts:
    """What was found in a dump and what was made of it.

    Attributes:
        site: Host name of the site.
        questions: Questions in the dump.
        answers: Answers in the dump, orphans included.
        orphans: Answers whose question is not in the dump; they are left out.
        empty: Posts without any text; they are left out.
        pairs_unequal: Pairs of answers to one question with unequal scores.
        pairs: Pairs written, at most `max_pairs` for a question.
        splits: Rows per split and table.
    """

    site: str
    questions: int
    answers: int
    orphans: int
    empty: int
    pairs_unequal: int
    pairs: int
    splits: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        return asdict(self)


def prepare_stackexchange(
    dump: Path,
    out: Path,
    *,
    site: str | None = None,
    seed: int,
    max_pairs: int = 10,
    fractions: Mapping[str, float],
    on_progress: Progress = lambda _done, _total: None,
) -> Counts:
    """Turn a dump folder into `out/{split}/{queries,answers,pairs}.parquet`.

    Args:
        dump: Folder with `Posts.xml` and, if authors are to have names, `Users.xml`.
        out: Folder to make; one made by this function before is replaced.
        site: Host name for provenance; None derives it from the folder's name.
        seed: Decides splits, kept pairs and the order of questions.
        max_pairs: The most pairs one question may give.
        fractions: Share of the questions per split, by name; see `scoring.SPLITS`.
        on_progress: Called with (bytes read, bytes in all) during the first pass.

    Returns:
        What was found and what was written.

    Raises:
        DataError: the dump is missing, damaged or holds no pair; nothing is written then.
        ConfigError: an option is wrong, or `out` holds something else.
        StorageError: the disk refused.

    Source: StackLLaMA (huggingface/blog, stackllama.md) and its preprocessing notebook
    (lvwerra/stack-exchange-paired); the choice of pairs is by hash and not by a shared generator.
    """
    check_fractions(fractions)
    if max_pairs < 1:
        raise ConfigError(f"data.max_pairs is {max_pairs}", "give 1 or more; 10 is customary")
    posts = _check_dump(dump)
    _check_out(out, dump)
    rules = Rules(
        site=site_of(dump) if site is None else checked_site(site),
        seed=seed,
        max_pairs=max_pairs,
        fractions=fractions,
    )
    with atomic_folder(out) as folder:
        aside = folder / ".aside"
        aside.mkdir()
        tally = _Tally()
        spill = PostSpill(aside, buckets=max(1, posts.stat().st_size // BUCKET_BYTES))
        with NameStore(aside / "names.sqlite") as names:
            _put_aside(dump, spill, names, tally, rules, on_progress)
            with SplitWriters(folder) as writers:
                for thread in _threads(spill, names, rules, posts):
                    tally.add(thread)
                    for table, added in thread.rows.items():
                        for row in added:
                            writers.add(thread.split, table, row)
        shutil.rmtree(aside)
        splits = writers.counts()
        _check_enough(posts, tally, splits, fractions)
    return Counts(
        site=rules.site,
        questions=tally.questions,
        answers=tally.answers,
        orphans=tally.orphans,
        empty=tally.empty,
        pairs_unequal=tally.pairs_unequal,
        pairs=sum(tables["pairs"] for tables in splits.values()),
        splits=splits,
    )


def _check_dump(dump: Path) -> Path:
    posts = dump / "Posts.xml"
    unpack = "give the folder into which the dump's archive was unpacked; it holds Posts.xml"
    if not dump.is_dir():
        raise DataError(f"no such folder: {dump}", unpack)
    if not posts.is_file():
        raise DataError(f"{dump} holds no Posts.xml", unpack)
    if not posts.stat().st_size:
        raise DataError(f"{posts} is empty", "unpack or download the dump again")
    return posts


def _check_out(out: Path, dump: Path) -> None:
    """Refuse to replace a folder that this module did not make."""
    if dump.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the dump itself", "choose another folder to write to")
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} exists and is not a folder", "choose another folder to write to")
    if any(out.iterdir()) and not (out / SPLITS[0] / "queries.parquet").is_file():
        raise ConfigError(
            f"{out} holds something that was not prepared from a dump",
            "choose another folder, or empty it first",
        )


def _put_aside(
    dump: Path,
    spill: PostSpill,
    names: NameStore,
    tally: _Tally,
    rules: Rules,
    on_progress: Progress,
) -> None:
    """First pass: stream the dump, check each row, keep what matters."""
    files = [path for path in (dump / "Users.xml", dump / "Posts.xml") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    if len(files) == 2:
        names.fill(_users(files[0], on_bytes))
    seen = IdSet()
    for row in rows(files[-1], on_bytes):
        kind = row.integer("PostTypeId")
        if kind in (_QUESTION, _ANSWER):
            post = _post(row, is_question=kind == _QUESTION)
            if not seen.add(post["post_id"]):
                raise row.error("has an Id that an earlier row has too")
            post["rank"] = seed_of(rules.seed, "rank", rules.site, post["question_id"])
            spill.add(post)
            if kind == _QUESTION:
                tally.questions += 1
            else:
                tally.answers += 1
    if not tally.questions:
        raise DataError(
            f"{files[-1]} holds no question (no row with PostTypeId 1)",
            "is this the Posts.xml of a Stack Exchange dump?",
        )


def _users(path: Path, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    for row in rows(path, on_bytes):
        name = " ".join((row.text("DisplayName") or "").split())
        if name:
            yield row.integer("Id"), name


def _post(row: Row, *, is_question: bool) -> Post:
    post_id = row.integer("Id")
    if post_id < 0:
        raise row.error("has a negative Id")
    question_id = post_id if is_question else row.integer("ParentId")
    return {
        "question_id": question_id,
        "post_id": post_id,
        "is_question": is_question,
        "votes": row.integer("Score"),
        "accepted_id": row.optional_integer("AcceptedAnswerId") if is_question else None,
        "title": " ".join((row.text("Title") or "").split()) if is_question else "",
        "body": row.text("Body") or "",
        "owner_id": row.optional_integer("OwnerUserId"),
        "owner_name": " ".join((row.text("OwnerDisplayName") or "").split()) or None,
        "licence": row.text("ContentLicense") or licence_at(row.text("CreationDate") or ""),
        "line": row.line,
    }


def _threads(spill: PostSpill, names: NameStore, rules: Rules, source: Path) -> Iterator[Thread]:
    """Second pass: one bucket of questions in memory at a time."""
    for bucket in spill.buckets():
        known = names.names(post["owner_id"] for post in bucket if post["owner_id"] is not None)
        for post in bucket:
            owner = post["owner_id"]
            fallback = post["owner_name"] or ("unknown" if owner is None else f"user{owner}")
            post["author"] = known.get(owner, fallback)
        for _, posts in groupby(bucket, key=itemgetter("question_id")):
            yield assemble(list(posts), rules, source)


def _check_enough(
    posts: Path,
    tally: _Tally,
    counts: Mapping[str, Mapping[str, int]],
    fractions: Mapping[str, float],
) -> None:
    """Refuse a result that a later stage could not use, and say why."""
    if not any(tables["pairs"] for tables in counts.values()):
        raise DataError(
            f"{posts} gives no pair of answers to compare: {tally.questions} questions, "
            f"{tally.answers} answers, {tally.several} questions with two answers or more, "
            "none of them with unequal scores",
            "use a dump with more answers per question",
        )
    bare = [
        f"{split} has no {table}"
        for split, tables in _NEEDED.items()
        for table in tables
        if fractions[split] > 0 and not counts[split][table]
    ]
    if bare:
        raise DataError(
            f"{posts}: too few questions ({tally.questions}) for this split: {'; '.join(bare)}",
            "use a larger dump, another seed or other data.fractions",
        )


def render_examples(out: Path, *, width: int = 240) -> str:
    """One shortened example of each table of a prepared folder, for reading.

    Args:
        out: What `prepare_stackexchange` wrote.
        width: The most characters of one text that are shown.
    """
    blocks = []
    shown = {"supervised": "answers", "reward": "pairs", "policy": "queries", "evaluation": "pairs"}
    for split, table in shown.items():
        path = out / split / f"{table}.parquet"
        batch = next(pq.ParquetFile(path).iter_batches(batch_size=1), None)
        if batch is None:
            continue
        row = batch.to_pylist()[0]
        texts = [
            f"  {name}: {_shorten(row[name], width)}"
            for name in SCHEMAS[table].names
            if name in ("query", "response", "chosen", "rejected", "score", "link")
        ]
        blocks.append("\n".join([f"{split}/{path.name}", *texts]))
    return "\n\n".join(blocks)


def _shorten(value: object, width: int) -> str:
    text = str(value)
    text = text if len(text) <= width else text[: width - 3].rstrip() + "..."
    return text.replace("\n", "\n    ")
