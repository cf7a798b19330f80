"""Answers before and after PPO, chosen by rule, and how answers changed while training went on."""

from __future__ import annotations

from dataclasses import dataclass

from suasion.evaluate.report.charts import sorted_bars
from suasion.evaluate.report.load import Row, Run
from suasion.evaluate.report.markup import Html, join, tag
from suasion.evaluate.report.wording import count, decimal, number, signed

LONGEST = 3000
"""Characters of a text that are shown."""
QUERIES = 4
"""Prompts whose answers are followed through training."""
MOMENTS = 4
"""Steps at which they are shown, first and last included."""

CONTRARY = {("Largest gain", False): "Smallest loss", ("Largest loss", True): "Smallest gain"}
"""What the two ends are called where every comparison went the same way."""


@dataclass(frozen=True)
class Pick:
    """One comparison that is shown."""

    position: int
    """Where it stands when all are sorted by their change, from 0."""
    label: str
    """Why it is shown."""


def changes(rows: list[Row]) -> tuple[str, list[tuple[float, Row]]]:
    """The score that comparisons are sorted by, and the comparisons in rising order of change.

    Gold where every comparison has it, else the reward model's score. Rows without either are
    left out; equal changes keep the order of the file.
    """
    for judged in ("gold", "score"):
        pairs = [(number(r.get(f"{judged}_a")), number(r.get(f"{judged}_b")), r) for r in rows]
        known = [(b - a, row) for a, b, row in pairs if a is not None and b is not None]
        if known and (judged == "score" or len(known) == len(rows)):
            return judged, sorted(known, key=lambda item: item[0])
    return "score", []


def picks(total: int) -> list[Pick]:
    """Largest gain, median and largest loss of `total` sorted comparisons, none of them twice."""
    if total < 2:
        return [Pick(0, "The only comparison")] * total
    chosen: dict[int, str] = {}
    for position, label in (
        (total - 1, "Largest gain"),
        (0, "Largest loss"),
        ((total - 1) // 2, "Median"),
    ):
        chosen.setdefault(position, label)
    return [Pick(position, chosen[position]) for position in sorted(chosen, reverse=True)]


def comparisons(run: Run) -> Html | None:
    """The distribution of all changes and three comparisons side by side, or None without any."""
    judged, ordered = changes(run.comparisons)
    if not ordered:
        return None
    shown = picks(len(ordered))
    better = sum(change > 0 for change, _ in ordered)
    worse = sum(change < 0 for change, _ in ordered)
    name = "gold score" if judged == "gold" else "reward score"
    how = (
        f"All {count(len(ordered))} comparisons, sorted by the change in {name}: "
        f"{count(better)} better, {count(worse)} worse, "
        f"{count(len(ordered) - better - worse)} unchanged. Shown below are the largest gain, the "
        "median and the largest loss (the marked bars), picked by that rule and not by hand."
    )
    bars = sorted_bars([change for change, _ in ordered], [pick.position for pick in shown])
    return join(
        [
            tag("p", how),
            tag("figure", bars, class_="spread"),
            *(_comparison(pick, *ordered[pick.position], judged, run.names) for pick in shown),
        ]
    )


def _comparison(pick: Pick, change: float, row: Row, judged: str, names: tuple[str, str]) -> Html:
    name = "gold" if judged == "gold" else "score"
    label = CONTRARY.get((pick.label, change > 0), pick.label)
    kind = "gain" if change > 0 else "loss" if change < 0 else "same"
    head = tag("h3", label, tag("span", f"{name} {signed(change)}", class_=f"badge {kind}"))
    sides = [_answer(row, side, title) for side, title in zip("ab", names, strict=True)]
    return tag(
        "article",
        head,
        tag("h4", "Prompt"),
        passage(row.get("query"), "query"),
        tag("div", *sides, class_="sides"),
        class_="comparison",
    )


def _answer(row: Row, side: str, title: str) -> Html:
    badges = [
        tag("span", f"{name} {decimal(row[key])}", class_="badge")
        for name, key in (("score", f"score_{side}"), ("gold", f"gold_{side}"))
        if number(row.get(key)) is not None
    ]
    length = number(row.get(f"length_{side}"))
    if length is not None:
        badges.append(tag("span", f"{count(length)} tokens", class_="badge quiet"))
    when = tag("span", "before" if side == "a" else "after", class_="when")
    head = tag("h4", title.upper() if len(title) <= 4 else title, when, *badges)
    return tag("div", head, passage(row.get(f"response_{side}")), class_=f"side {side}")


def passage(value: object, kind: str = "") -> Html:
    """A text as it was written, Markdown and all, cut after `LONGEST` characters."""
    written = "" if value is None else str(value)
    if not written.strip():
        return tag("p", "(empty)", class_="empty")
    rest = len(written) - LONGEST
    cut = tag("span", f" … {count(rest)} more characters", class_="cut") if rest > 0 else None
    shown = written[:LONGEST]
    # An HTML parser drops a newline right after <pre>; one of ours goes first.
    return tag("pre", "\n" + shown, cut, dir="auto", class_=f"passage {kind}".strip())


def progress(run: Run) -> Html | None:
    """Answers to the same prompts at several steps of PPO, or None without samples."""
    by_prompt: dict[tuple[float, str], dict[float, Row]] = {}
    for row in run.samples:
        step, index = number(row.get("step")), number(row.get("index"))
        if step is not None and index is not None:
            by_prompt.setdefault((index, str(row.get("query") or "")), {})[step] = row
    prompts = sorted(by_prompt.items(), key=lambda item: item[0])[:QUERIES]
    if not prompts:
        return None
    return join(
        _prompt(query, moments, is_open=position == 0)
        for position, ((_, query), moments) in enumerate(prompts)
    )


def _prompt(query: str, moments: dict[float, Row], *, is_open: bool) -> Html:
    steps = sorted(moments)
    columns = [
        tag(
            "div",
            tag("h4", f"Step {count(step)}", _score(moments[step])),
            passage(moments[step].get("response")),
            class_="side",
        )
        for step in evenly(steps, MOMENTS)
    ]
    first, last = number(moments[steps[0]].get("score")), number(moments[steps[-1]].get("score"))
    change = f" {decimal(first)} → {decimal(last)}" if None not in (first, last) else ""
    words = " ".join(query.split())
    title = words[:90] + ("…" if len(words) > 90 else "") or "(empty prompt)"
    return tag(
        "details",
        tag("summary", tag("bdi", title), tag("span", change, class_="quiet") if change else None),
        tag("h4", "Prompt"),
        passage(query, "query"),
        tag("div", *columns, class_="moments"),
        class_="prompt",
        open=is_open,
    )


def _score(row: Row) -> Html | None:
    score = number(row.get("score"))
    return None if score is None else tag("span", f"score {decimal(score)}", class_="badge")


def evenly(steps: list[float], most: int) -> list[float]:
    """At most `most` of `steps`, first and last included, evenly spread."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
