"""The report page: whole, closed to the network, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from suasion.core.errors import DataError
from suasion.core.summary import Summary
from suasion.evaluate.report import write_report
from suasion.evaluate.report.load import load_run
from suasion.evaluate.report.verdict import doubts, verdict

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "merge", "evaluate")
HOSTILE = (
    "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(1)>"
    "\"' onclick='x' $title {{7*7}} &amp; \x00\x1b[31m \ud800 \u202e \U0001f600 ```"
)
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text; unbalanced tags are an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element, which must be this one."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text, style included."""
        return "".join(self.words)

    def values(self, name: str) -> list[str | None]:
        """Every value of an attribute."""
        return [value for _, key, value in self.attributes if key == name]


def page_of(run: Path) -> tuple[Page, str]:
    """Write the report of `run` and parse it."""
    html = write_report(run, run.parent / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def compare_with(run: Path, **figures: Any) -> None:
    """Replace figures of the comparison."""
    edit(
        run / "evaluate" / "manifest.json",
        lambda manifest: manifest["result"]["compare"].update(figures),
    )


def test_the_page_is_whole(make_run: MakeRun) -> None:
    """One title, one heading, unique anchors that all lead somewhere, every section there."""
    page, html = page_of(make_run())
    assert html.startswith("<!doctype html>\n")
    assert page.tags.count("h1") == page.tags.count("title") - page.tags.count("g") == 1
    anchors = page.values("id")
    assert len(set(anchors)) == len(anchors) == 11
    assert page.values("href") == [f"#{anchor}" for anchor in anchors]
    assert "63.3\u202f% of 128 held-out prompts" in page.text
    assert "54.7\u202f%" in page.text
    assert "12 of 32 answers reached the length limit" in page.text
    assert "3f2a9c81d0b7" in page.text


def test_the_page_loads_nothing(make_run: MakeRun) -> None:
    """No script, no source, no import, no address; the browser is told to refuse any."""
    page, html = page_of(make_run())
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "srcset", "action", "xlink:href", "data"} & {
        k for _, k, _ in page.attributes
    }
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html
    assert any("default-src 'none'" in (value or "") for value in page.values("content"))


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    """Written twice, and from a copy elsewhere."""
    run = make_run()
    first = write_report(run, tmp_path / "a.html").read_bytes()
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "demo")
    assert write_report(run, tmp_path / "b.html").read_bytes() == first
    assert write_report(copy, tmp_path / "c.html").read_bytes() == first


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    """Markup in every string a run can hold adds no element and no attribute."""
    run = make_run()
    clean, _ = page_of(run)

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return HOSTILE if isinstance(value, str) else value

    for path in run.rglob("*.json"):
        content = poison(json.loads(path.read_text()))
        content["config"][HOSTILE] = content["versions"][HOSTILE] = HOSTILE
        content["outputs"][HOSTILE] = HOSTILE
        path.write_text(json.dumps(content))
    for path in run.rglob("*.jsonl"):
        rows = [poison(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "recipe.yaml").write_text(HOSTILE.replace("\ud800", ""))
    page, html = page_of(run.rename(run.with_name("<script>alert(2)<")))
    assert set(page.tags) == set(clean.tags)
    known = {name for _, name, _ in clean.attributes}
    assert {name for _, name, _ in page.attributes} <= known
    assert "<script" not in html
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", html)
    assert "</pre></title></style><script>alert(1)</script>" in page.text
    assert "$title {{7*7}} &amp; " in page.text


def test_numbers_that_are_none_or_not_finite(make_run: MakeRun) -> None:
    """They are left out or shown as a dash, never as a number, and the page says so."""
    run = make_run()
    rows = [
        {"step": step, "env/reward_mean": value, "objective/kl": float("inf")}
        for step, value in enumerate([0.1, float("nan"), None, 0.3])
    ]
    (run / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare_with(run, gold_a=None, gold_b=float("nan"), win_rate_low=None, length_a="many")
    page, html = page_of(run)
    assert "2 values not finite, not drawn." in page.text
    assert "Not finite at some step: env/reward_mean, objective/kl." in page.text
    assert "KL from the reference over" not in html
    assert not re.search(r"\b(nan|inf|None)\b", html)


def test_a_huge_text_is_cut(make_run: MakeRun) -> None:
    """A megabyte of answer becomes a page one can open."""
    run = make_run("ppo")
    row = {"step": 0, "index": 0, "query": "", "response": "x" * 1_000_000, "score": 1e300}
    (run / "ppo" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page, html = page_of(run)
    assert "997,000 more characters" in page.text
    assert "(empty)" in page.text
    assert len(html) < 600_000


@pytest.mark.parametrize(
    "stages",
    [
        *((stage,) for stage in STAGES),
        *(tuple(s for s in STAGES if s != left_out) for left_out in STAGES),
        ("prepare", "reward"),
    ],
)
def test_missing_parts_are_left_out(make_run: MakeRun, stages: tuple[str, ...]) -> None:
    """Each stage alone, and all but one."""
    page, _ = page_of(make_run(*stages))
    anchors = page.values("id")
    assert ("samples" in anchors) == ("evaluate" in stages)
    assert ("ppo" in anchors) == ("ppo" in stages)
    assert ("reward" in anchors) == bool({"reward", "evaluate"} & set(stages))
    assert ("training" in anchors) == bool({"pretrain", "sft", "reward"} & set(stages))
    assert "unfinished" not in page.values("class")


def test_a_run_that_was_interrupted(make_run: MakeRun) -> None:
    """Metrics without a manifest are drawn, and the stage is marked."""
    run = make_run("ppo")
    (run / "ppo" / "manifest.json").unlink()
    (run / "recipe.yaml").unlink()
    with (run / "ppo" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 200, "env/rew')
    page, _ = page_of(run)
    assert "unfinished" in page.values("class")
    assert "chart" in page.values("class")


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    """Nothing is written for it."""
    with pytest.raises(DataError, match="no stage of a run"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", '{"result": [1]}'),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n'),
        ("metrics.jsonl", "7\n"),
    ],
)
def test_a_malformed_file_is_named(make_run: MakeRun, name: str, content: str) -> None:
    """Missing is fine, broken is not."""
    run = make_run("reward")
    (run / "reward" / name).write_text(content)
    with pytest.raises(DataError, match=rf"reward/{name}"):
        page_of(run)


def test_the_saved_summary_comes_first(make_run: MakeRun) -> None:
    """What it knows wins; what it does not know comes from the stages."""
    run = make_run()
    Summary(win_rate=0.58, win_rate_low=0.52, win_rate_high=0.64).write(run / "summary.json")
    summary = load_run(run).summary
    assert (summary.win_rate, summary.win_rate_high) == (0.58, 0.64)
    assert (summary.kl, summary.reward_accuracy) == (5.41, 0.664)
    assert summary.seconds == pytest.approx(754.4)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, "PPO made the answers better: they win on 63.3"),
        ({"win_rate": 0.31, "win_rate_low": 0.2, "win_rate_high": 0.44}, "answers worse"),
        ({"win_rate": 0.53, "win_rate_low": 0.44}, "no difference that can be told from chance"),
        ({"win_by": "score"}, "judged by the reward it was trained on"),
    ],
)
def test_the_verdict_follows_the_interval(
    make_run: MakeRun, figures: dict[str, Any], said: str
) -> None:
    """Better or worse only where the interval is on one side of one half."""
    run = make_run()
    compare_with(run, **figures)
    assert said in verdict(load_run(run))


def test_models_and_level_are_named_as_they_were_configured(make_run: MakeRun) -> None:
    """Paths are cut to the part that tells them apart; an interval carries its own level."""
    run = make_run()
    assert load_run(run).names == ("sft/model", "ppo/model")
    assert "95\u202f% interval 55.1" in page_of(run)[0].text
    compare_with(run, a="runs/demo/merge", b="someone/policy")
    edit(run / "evaluate" / "manifest.json", lambda m: m["config"].update(level=0.9))
    assert load_run(run).names == ("merge", "policy")
    assert "90\u202f% interval 55.1" in page_of(run)[0].text


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("prepare", "nothing has been trained"),
        ("sft", "lowered perplexity on held-out text from 38.9 to 24.3"),
        ("reward", "prefers the chosen answer in 66.4"),
        ("ppo", "rose from \u22120.21 to 1.38 in 200 steps of PPO, at 5.62 nats"),
    ],
)
def test_the_verdict_falls_back_to_what_was_reached(
    make_run: MakeRun, stage: str, said: str
) -> None:
    """One stage alone still gets its sentence."""
    assert said in verdict(load_run(make_run(stage)))


def test_doubts_are_raised_only_where_there_is_reason(make_run: MakeRun) -> None:
    """A sound run has none; each fault brings its own."""
    run = make_run()
    assert doubts(load_run(run)) == []
    compare_with(run, gold_b=0.9, length_b=140.0, win_by="score")
    reward = run / "evaluate" / "manifest.json"
    edit(reward, lambda m: m["result"]["reward"].update(longer_wins_accuracy=0.65))
    with (run / "ppo" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 200, "objective/kl": -3.7, "tokens/unfinished": 0.81}\n')
    found = " ".join(doubts(load_run(run)))
    for fault in (
        "over-optimisation", "grew from 61.2 to 140 tokens", "with the reward that PPO was trained",
        "always preferring the longer answer", "lowest \u22123.70 nats at step 200",
        "81.0\u202f% of the answers of the last step were cut",
    ):  # fmt: skip
        assert fault in found
