"""From a dump to tables: right, whole, reproducible, and in bounded memory."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from lxml import etree

from suasion.core.errors import ConfigError, DataError
from suasion.core.files import folder_hashes
from suasion.data import stackexchange
from suasion.data.dump import rows
from suasion.data.origin import licence_at, site_of
from suasion.data.scoring import DEFAULT_FRACTIONS, SPLITS
from suasion.data.sets import SCHEMAS
from suasion.data.stackexchange import Counts, prepare_stackexchange, render_examples
from tests.unit.data.conftest import Prepared
from tests.unit.data.dumps import (
    HEAD,
    TAIL,
    answer,
    attributes,
    question,
    recount,
    threads,
    write_posts,
)


def prepare(dump: Path, out: Path, **options: Any) -> Counts:
    """Prepare with the defaults of the tests."""
    return prepare_stackexchange(
        dump, out, **{"site": "a.example", "seed": 1, "fractions": DEFAULT_FRACTIONS, **options}
    )


def read(out: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table, split by split."""
    return [
        row
        for split in SPLITS
        for row in pq.read_table(out / split / f"{table}.parquet").to_pylist()
    ]


def check_against_recount(dump: Path, out: Path, counts: Counts) -> None:
    """Compare with a count that shares no code."""
    truth = recount(dump / "Posts.xml")
    assert (counts.questions, counts.answers) == (truth.questions, truth.answers)
    assert (counts.pairs_unequal, counts.pairs) == (truth.pairs_unequal, truth.pairs)
    pairs = read(out, "pairs")
    assert len(pairs) == counts.pairs
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_score"] == truth.scores[pair[f"{side}_id"]]
            assert pair["question_id"] == truth.parents[pair[f"{side}_id"]]
        assert pair["chosen_score"] > pair["rejected_score"]
    assert len({(p["chosen_id"], p["rejected_id"]) for p in pairs}) == len(pairs)
    assert {r["answer_id"]: r["score"] for r in read(out, "answers")} == truth.scores


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "figures"),
    [("beer-2016-12", (591, 1398, 1471, 1149)), ("conlang-meta-2020-09", (54, 115, 132, 75))],
)
def test_real_dumps_give_the_known_counts(
    real_data: Path, tmp_path: Path, name: str, figures: tuple[int, ...]
) -> None:
    """Real dumps agree with counts made by others, and with the recount."""
    dump = real_data / "stackexchange" / name
    counts = prepare(dump, tmp_path / "out", site=None)
    found = (counts.questions, counts.answers, counts.pairs_unequal, counts.pairs)
    assert found == figures
    assert counts.orphans == counts.empty == 0
    check_against_recount(dump, tmp_path / "out", counts)


@pytest.mark.real_data
def test_real_dump_scores_equal_their_votes(real_data: Path) -> None:
    """The parser loses no post and no vote."""
    for name in ("beer-2016-12", "conlang-meta-2020-09"):
        check_votes(real_data / "stackexchange" / name)


def test_world_agrees_with_the_recount(world: Prepared) -> None:
    """Pairs and scores agree with code that shares nothing."""
    check_against_recount(world.dump, world.out, world.counts)


def test_world_scores_equal_its_votes(world: Prepared) -> None:
    """The synthetic dump keeps the real dumps' invariant."""
    check_votes(world.dump)


def check_votes(dump: Path) -> None:
    """`Score` is up-votes minus down-votes for every question and answer."""
    balance: Counter[str] = Counter()
    for vote in attributes(dump / "Votes.xml"):
        balance[vote["PostId"]] += {"2": 1, "3": -1}.get(vote["VoteTypeId"], 0)
    checked = 0
    for post in attributes(dump / "Posts.xml"):
        if post["PostTypeId"] in ("1", "2"):
            assert int(post["Score"]) == balance[post["Id"]]
            checked += 1
    assert checked > 100


def test_no_question_is_in_two_splits(world: Prepared) -> None:
    """Nothing leaks, in any table."""
    homes: dict[int, set[str]] = defaultdict(set)
    for split in SPLITS:
        for table in SCHEMAS:
            for row in world.rows(table, split):
                homes[row["question_id"]].add(split)
    assert len(homes) == world.counts.questions
    assert all(len(splits) == 1 for splits in homes.values())
    assert {s for splits in homes.values() for s in splits} == set(SPLITS)


def test_counts_say_what_is_on_the_disk(world: Prepared) -> None:
    """Reported rows are the rows written, with the documented columns."""
    for split in SPLITS:
        for table, schema in SCHEMAS.items():
            file = pq.ParquetFile(world.out / split / f"{table}.parquet")
            assert file.schema_arrow.equals(schema)
            assert file.metadata.num_rows == world.counts.splits[split][table]
    assert sorted(p.name for p in world.out.iterdir()) == sorted(SPLITS)
    assert world.counts.as_dict()["splits"]["reward"]["pairs"] > 0


def test_best_is_one_answer_per_question_with_the_highest_score(world: Prepared) -> None:
    """Ties go to votes, then to the older answer."""
    by_question: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in world.rows("answers"):
        by_question[row["question_id"]].append(row)
    for answers in by_question.values():
        (best,) = [row for row in answers if row["best"]]
        order = [(-row["score"], -row["votes"], row["answer_id"]) for row in answers]
        assert (-best["score"], -best["votes"], best["answer_id"]) == min(order)


def test_neither_row_order_nor_bucket_count_changes_a_byte(
    world: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is a function of the dump's content and the seed."""
    lines = (world.dump / "Posts.xml").read_text("utf-8-sig").splitlines(keepends=True)
    body = lines[2:-1]
    random.Random(0).shuffle(body)  # noqa: S311
    shuffled = write_posts(tmp_path / "shuffled", body, head="".join(lines[:2]), tail=lines[-1])
    (shuffled / "Users.xml").write_bytes((world.dump / "Users.xml").read_bytes())
    monkeypatch.setattr(stackexchange, "BUCKET_BYTES", 100_000)
    for dump, out in ((world.dump, tmp_path / "a"), (shuffled, tmp_path / "b")):
        prepare(dump, out, site=world.counts.site, seed=3)
        assert folder_hashes(out) == folder_hashes(world.out)
    # Negative control: another seed does change them.
    prepare(world.dump, tmp_path / "c", site=world.counts.site, seed=4)
    assert folder_hashes(tmp_path / "c") != folder_hashes(world.out)


def test_memory_does_not_grow_with_the_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory follows the buffers and not the file."""
    spill = stackexchange.PostSpill
    monkeypatch.setattr("suasion.data.sets._GROUP_ROWS", 16)

    def peak(name: str, count: int, budget: int) -> int:
        """Most memory held while preparing `count` questions, with buffers of `budget` bytes."""
        monkeypatch.setattr(stackexchange, "BUCKET_BYTES", budget)
        monkeypatch.setattr(
            stackexchange, "PostSpill", lambda *a, **k: spill(*a, **k, buffer_bytes=budget)
        )
        dump = write_posts(
            tmp_path / name,
            (
                text
                for q in range(1, 3 * count, 3)
                for text in (question(q), answer(q + 1, q, 1, body="x" * 2000), answer(q + 2, q, 9))
            ),
        )
        tracemalloc.start()
        prepare(dump, tmp_path / f"{name}-out")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak("first", 100, 100_000)  # what is loaded once
    small, large = peak("small", 200, 100_000), peak("large", 1000, 100_000)
    assert large < 1.5 * small
    # Negative control: buffers as large as the dump do grow with it.
    assert peak("unbounded", 1000, 1 << 30) > 2 * small


def test_the_parser_keeps_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the parser's own memory, which Python cannot see, grow with the rows."""
    parsers = []

    def remembered(*args: Any, **options: Any) -> Any:
        parsers.append(etree.iterparse(*args, **options))
        return parsers[-1]

    monkeypatch.setattr("suasion.data.dump.etree", SimpleNamespace(**vars(etree)))
    monkeypatch.setattr("suasion.data.dump.etree.iterparse", remembered)
    dump = write_posts(tmp_path / "dump", threads(100))
    assert sum(1 for _ in rows(dump / "Posts.xml")) == 300
    assert len(parsers[0].root) <= 1


def test_the_seed_decides_the_order_of_questions(tmp_path: Path) -> None:
    """So that the first rows of a table are a random sample of it."""
    dump = write_posts(tmp_path / "dump", threads(40))
    everything = {name: float(name == "reward") for name in SPLITS}
    orders = []
    for seed in (1, 2):
        prepare(dump, tmp_path / f"out{seed}", seed=seed, fractions=everything)
        orders.append([row["question_id"] for row in read(tmp_path / f"out{seed}", "queries")])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, 120, 3))
    assert orders[0] != sorted(orders[0])


def test_texts_authors_links_and_licences(tmp_path: Path) -> None:
    """Every column of every table, on a dump written by hand."""
    posts = [
        question(
            1,
            'OwnerUserId="5" AcceptedAnswerId="3" CreationDate="2010-01-01T00:00:00"',
            title="How &amp; why?",
            body="<p>See <code>a &lt; b</code></p>",
        ),
        answer(2, 1, 4, 'OwnerUserId="9" OwnerDisplayName="gone" CreationDate="2012-01-01"'),
        answer(3, 1, 0, 'OwnerDisplayName="old  name" ContentLicense="CC BY-SA 4.0"'),
        answer(4, 1, -2, 'OwnerUserId="77"', body="<p>No.</p>\n<pre><code>x\n</code></pre>"),
        answer(5, 1, 11, 'CreationDate="2020-01-01"'),
        answer(6, 1, 3, body="<p> </p>"),
        answer(7, 99, 3),
    ]
    dump = write_posts(tmp_path / "beer-2016-12", posts)
    (dump / "Users.xml").write_text('<users><row Id="5" DisplayName="Ann" /></users>')
    counts = prepare(
        dump,
        tmp_path / "out",
        site=None,
        fractions={name: float(name == "reward") for name in SPLITS},
    )
    assert (counts.questions, counts.answers, counts.orphans, counts.empty) == (1, 6, 1, 1)
    assert counts.site == "beer.stackexchange.com"
    (query,) = read(tmp_path / "out", "queries")
    assert query == {
        "query": "How &amp; why?\n\nSee `a < b`",
        "question_id": 1,
        "site": "beer.stackexchange.com",
        "link": "https://beer.stackexchange.com/questions/1",
        "author": "Ann",
        "licence": "CC BY-SA 2.5",
    }
    answers = {row["answer_id"]: row for row in read(tmp_path / "out", "answers")}
    assert {i: (r["score"], r["accepted"], r["best"]) for i, r in answers.items()} == {
        2: (2, False, False),
        3: (1, True, False),
        4: (-1, False, False),
        5: (4, False, True),
    }
    assert [answers[i]["author"] for i in (2, 3, 4, 5)] == ["gone", "old name", "user77", "unknown"]
    assert answers[4]["response"] == "No.\n\n```\nx\n```"
    pairs = {(p["chosen_id"], p["rejected_id"]): p for p in read(tmp_path / "out", "pairs")}
    assert set(pairs) == {(2, 3), (2, 4), (5, 2), (3, 4), (5, 3), (5, 4)}
    assert pairs[5, 2]["licence"] == "CC BY-SA 2.5; CC BY-SA 3.0; CC BY-SA 4.0"
    assert (pairs[2, 3]["chosen_author"], pairs[2, 3]["rejected_author"]) == ("gone", "old name")


def test_byte_order_mark_line_ends_and_forbidden_characters(tmp_path: Path) -> None:
    """Ugly bytes give the same tables as clean ones."""
    plain = "".join(threads(60))
    ugly = plain.replace("Question 31", "Question\x02 &#x1F;&#31;&#xFFFE;31").replace("\n", "\r\n")
    counts = [
        prepare(write_posts(tmp_path / name, [text], head=head), tmp_path / f"{name}-out")
        for name, text, head in (
            ("plain", plain, HEAD.removeprefix("\ufeff")),
            ("ugly", ugly, HEAD),
        )
    ]
    assert counts[0] == counts[1]
    hashes = [folder_hashes(tmp_path / f"{name}-out") for name in ("plain", "ugly")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 17, 64])
def test_reading_does_not_hang_on_where_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """A reference or a declaration cut in two by the buffer is still seen whole."""
    ugly = "".join(threads(4)).replace("Question 4", "a&amp;b&#x1F;c\x02&#10;&#0;d&lt;&#xFFFF;")
    dump = write_posts(tmp_path / "dump", [ugly])
    whole = [(row.attributes, row.line) for row in rows(dump / "Posts.xml")]
    monkeypatch.setattr("suasion.data.dump._CHUNK", chunk)
    assert [(row.attributes, row.line) for row in rows(dump / "Posts.xml")] == whole
    assert whole[3][0]["Title"] == "a&b c \n d< "
    declared = HEAD.replace("<posts>", "<!DOCTYPE posts [<!ENTITY e 'x'>]><posts>")
    bad = write_posts(tmp_path / "bad", [ugly], head=declared)
    with pytest.raises(DataError, match="document type"):
        list(rows(bad / "Posts.xml"))


def replaced(old: str, new: str) -> Callable[[str], str]:
    """An edit that changes one place."""

    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


ROW_9 = answer(9, 7, 9, body="<p>Answer 9</p>")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replaced('Id="9" PostTypeId', "PostTypeId"), r"line 11: this row has no Id"),
        (replaced('Id="9" PostTypeId', 'Id="8" PostTypeId'), r"line 11: row Id='8' .*earlier row"),
        (replaced('ParentId="7" Score="9"', 'Score="9"'), r"line 11: row Id='9' has no ParentId"),
        (replaced('ParentId="7" Score="9"', 'ParentId="7"'), r"line 11: row Id='9' has no Score"),
        (replaced(ROW_9, ROW_9.replace('Score="9"', 'Score="9.5"')), r"line 11.*Score='9.5'"),
        (replaced(ROW_9, ROW_9.replace('"2" P', '"two" P')), r"line 11.*PostTypeId='two'"),
        (replaced('Id="9"', 'Id="-9"'), r"line 11: row Id='-9' has a negative Id"),
        (replaced('Id="9"', 'Id="1234567890123456789"'), r"line 11.*not an integer"),
        (lambda text: text[: len(text) // 2], r"line \d+: not well-formed XML"),
        (lambda text: text.removesuffix(TAIL), r"line \d+: not well-formed XML"),
        (lambda text: "PK\x03\x04" + text, r"line 1: not well-formed XML"),
        (lambda _: "", r"Posts\.xml is empty"),
        (lambda _: HEAD + TAIL, r"holds no question"),
        (lambda _: HEAD + question(1) + TAIL, r"no pair .* 1 questions, 0 answers, 0 questions"),
        (
            lambda _: HEAD + question(1) + answer(2, 1) + answer(3, 1) + TAIL,
            r"no pair .*1 questions with two answers or more",
        ),
        (
            lambda _: HEAD + question(1) + answer(2, 1) + answer(3, 1, 9) + TAIL,
            r"too few questions \(1\).*\bhas no (pairs|queries|answers)",
        ),
        (
            replaced("<posts>", '<!DOCTYPE p [<!ENTITY e SYSTEM "file:///etc/hostname">]><posts>'),
            r"declares a document type",
        ),
    ],
)
def test_bad_files_are_refused_by_name_and_leave_nothing(
    tmp_path: Path, edit: Callable[[str], str], message: str
) -> None:
    """Each fault is named with file and line, and no file is left."""
    dump = write_posts(tmp_path / "dump", threads(40))
    posts = dump / "Posts.xml"
    posts.write_bytes(edit(posts.read_bytes().decode()).encode())
    with pytest.raises(DataError, match=message) as caught:
        prepare(dump, tmp_path / "out")
    assert str(posts) in str(caught.value)
    assert caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


def test_damaged_users_are_refused_by_name(tmp_path: Path) -> None:
    """`Users.xml` is held to the same standard."""
    dump = write_posts(tmp_path / "dump", threads(40))
    (dump / "Users.xml").write_text('<users><row DisplayName="x" /></users>')
    with pytest.raises(DataError, match=r"Users\.xml, line 1: this row has no Id"):
        prepare(dump, tmp_path / "out")


def test_missing_dumps_are_refused(tmp_path: Path) -> None:
    """A missing folder and a folder without posts are told apart."""
    with pytest.raises(DataError, match="no such folder"):
        prepare(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"holds no Posts\.xml"):
        prepare(tmp_path / "bare", tmp_path / "out")


def test_only_a_prepared_folder_is_replaced(tmp_path: Path) -> None:
    """Other people's files, and the last good result, survive."""
    dump = write_posts(tmp_path / "dump", threads(40))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "mine", dump, tmp_path):
        with pytest.raises(ConfigError, match="choose another folder"):
            prepare(dump, out)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    prepare(dump, tmp_path / "out")
    before = folder_hashes(tmp_path / "out")
    (dump / "Posts.xml").write_text("<posts>")
    with pytest.raises(DataError):
        prepare(dump, tmp_path / "out")
    assert folder_hashes(tmp_path / "out") == before


def test_options_are_checked(tmp_path: Path) -> None:
    """Options are refused before anything is read."""
    dump = write_posts(tmp_path / "dump", threads(40))
    with pytest.raises(ConfigError, match="max_pairs"):
        prepare(dump, tmp_path / "out", max_pairs=0)
    with pytest.raises(DataError, match="host name"):
        prepare(dump, tmp_path / "out", site="a.example/../../x")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """Progress rises to the file's size."""
    dump = write_posts(tmp_path / "dump", threads(3000))
    seen: list[tuple[int, int]] = []
    prepare(dump, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    size = (dump / "Posts.xml").stat().st_size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        ("beer-2016-12", "beer.stackexchange.com"),
        ("conlang-meta-2020-09", "conlang.meta.stackexchange.com"),
        ("conlang-meta", "conlang.meta.stackexchange.com"),
        ("Cooking", "cooking.stackexchange.com"),
        ("stackoverflow.com", "stackoverflow.com"),
        ("beer.meta.stackexchange.com", "beer.meta.stackexchange.com"),
    ],
)
def test_site_from_the_folder(folder: str, site: str) -> None:
    """Folder names of all three styles in use."""
    assert site_of(Path("/somewhere") / folder) == site


def test_a_folder_that_names_no_site_is_refused() -> None:
    """A name with spaces cannot become a link."""
    with pytest.raises(DataError, match="host name"):
        site_of(Path("/somewhere/my data (new)"))


@pytest.mark.parametrize(
    ("date", "version"),
    [
        ("2011-04-07T23:59:59.999", " 2.5"),
        ("2011-04-08T00:00:00", " 3.0"),
        ("2018-05-01T23:59:59", " 3.0"),
        ("2018-05-02T00:00:00", " 4.0"),
        ("", ""),
    ],
)
def test_licence_by_date(date: str, version: str) -> None:
    """The two dates on which the licence changed."""
    assert licence_at(date) == f"CC BY-SA{version}"


def test_examples_are_short_and_show_each_set(world: Prepared) -> None:
    """What the command prints fits a terminal."""
    text = render_examples(world.out, width=60)
    for name in (
        "supervised/answers",
        "reward/pairs",
        "policy/queries",
        "evaluation/pairs",
        "chosen:",
        "rejected:",
    ):
        assert name in text
    assert max(map(len, text.splitlines())) < 90
    assert not re.search(r"\x1b", text)
