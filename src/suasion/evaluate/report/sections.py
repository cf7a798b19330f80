"""The tables and cards of the page: figures, stages, reward model, evaluation, provenance."""

from __future__ import annotations

import json
from typing import Any

from suasion.evaluate.report.charts import Share, share_plot
from suasion.evaluate.report.load import Row, Run, Stage
from suasion.evaluate.report.markup import Content, Html, join, tag
from suasion.evaluate.report.verdict import doubts, judge
from suasion.evaluate.report.wording import (
    NONE,
    count,
    decimal,
    duration,
    interval,
    number,
    percent,
    plain,
    signed,
    spaced,
)

TITLES = {
    "prepare": "Prepare",
    "pretrain": "Pretrain",
    "sft": "Fine-tune",
    "reward": "Reward model",
    "ppo": "PPO",
    "merge": "Merge",
    "evaluate": "Evaluate",
}
"""What each stage is called on the page."""

SCALE_START = 0.3
"""Where the scale of pair accuracies begins."""
HASH = 64
"""Hexadecimal digits of a SHA-256."""


def key_figure(run: Run) -> Html | None:
    """The win rate, large, with its interval; None where nothing was compared."""
    s = run.summary
    if s.win_rate is None:
        return None
    by = "by gold score" if judge(run) == "gold" else "by reward score"
    prompts = number(run.compare.get("prompts"))
    facts = [f"win rate of PPO, {by}"]
    if span := interval(s.win_rate_low, s.win_rate_high):
        facts.append(f"{run.level} interval {span}")
    if prompts is not None:
        facts.append(f"{count(prompts)} prompts")
    row = Share("", s.win_rate, "", s.win_rate_low, s.win_rate_high, main=True)
    return tag(
        "div",
        tag("div", percent(s.win_rate), class_="big"),
        tag("div", tag("p", " · ".join(facts)), share_plot([row], middle="no difference")),
        class_="hero",
    )


def figures(run: Run) -> Html | None:
    """Before and after, one row per question."""
    s, compare, ppo = run.summary, run.compare, run.result("ppo")
    tuned = "fine-tuned → PPO"
    score = (s.score_sft, s.score_ppo, tuned)
    if s.score_ppo is None:
        score = (ppo.get("score_first"), ppo.get("score_last"), "first → last step of PPO")
    rows = [
        ("Held-out perplexity", s.perplexity_before, s.perplexity_after, "base → fine-tuned"),
        ("Reward score", *score),
        ("Gold score", s.gold_sft, s.gold_ppo, tuned),
        ("Answer length, tokens", compare.get("length_a"), compare.get("length_b"), tuned),
    ]  # fmt: skip
    body = [_change(*row) for row in rows if (number(row[1]), number(row[2])) != (None, None)]
    kl = s.kl if s.kl is not None else number(ppo.get("kl_last"))
    singles = [
        ("KL from the reference, nats", decimal(kl) if kl is not None else "", "mean per answer"),
        (
            "Reward-model accuracy",
            percent(s.reward_accuracy) if s.reward_accuracy is not None else "",
            "held-out pairs ranked right",
        ),
    ]
    body += [
        _row(join([title, tag("small", note)], " "), "", shown, "")
        for title, shown, note in singles
        if shown
    ]
    if body and s.seconds is not None:
        body.append(_row("Time, all stages", "", duration(s.seconds), ""))
    return _table(("", "before", "after", "change"), body) if body else None


def _change(title: str, before: Any, after: Any, which: str) -> Html:
    first, last = number(before), number(after)
    change = signed(last - first) if first is not None and last is not None else ""
    name = join([title, tag("small", which)], " ")
    return _row(name, decimal(first), decimal(last), change)


def stages(run: Run) -> Html:
    """The path of the run: one card per stage, in the order they ran."""
    return tag("ol", *(_stage(stage) for stage in run.stages.values()), class_="path")


def _stage(stage: Stage) -> Html:
    facts = [tag("li", tag("b", value), " ", label) for value, label in _facts(stage)]
    if not stage.manifest:
        time = "not finished"
    else:
        time = duration(stage.manifest.get("seconds")) if "seconds" in stage.manifest else ""
    return tag(
        "li",
        tag("h3", TITLES[stage.name]),
        tag("p", time, class_="time") if time else None,
        tag("ul", *facts) if facts else None,
        class_=None if stage.manifest else "unfinished",
    )


def _facts(stage: Stage) -> list[tuple[str, str]]:
    """(figure, what it is): the few that tell what a stage did."""
    result = stage.result
    if stage.name in ("pretrain", "sft"):
        tokens = [(count(result["tokens"]), "tokens")] if number(result.get("tokens")) else []
        return _arrow(result, "perplexity_before", "perplexity_after", "perplexity") + tokens
    if stage.name == "reward":
        pairs = [(count(result["pairs"]), "held-out pairs")] if number(result.get("pairs")) else []
        accuracy = number(result.get("accuracy"))
        return ([(percent(accuracy), "ranked right")] if accuracy is not None else []) + pairs
    if stage.name == "ppo":
        steps = [(count(result["steps"]), "steps")] if number(result.get("steps")) else []
        kl = [(decimal(result["kl_last"]), "nats KL")] if number(result.get("kl_last")) else []
        return _arrow(result, "score_first", "score_last", "score") + steps + kl
    if stage.name == "evaluate":
        compare = result.get("compare") or {}
        share = number(compare.get("win_rate"))
        prompts = number(compare.get("prompts"))
        won = [(percent(share), "won")] if share is not None else []
        return won + ([(count(prompts), "prompts")] if prompts is not None else [])
    numbers = flat(stage.part("counts") or result)
    return [(decimal(value), key) for key, value in numbers if number(value) is not None][:5]


def _arrow(result: Row, first: str, last: str, label: str) -> list[tuple[str, str]]:
    before, after = number(result.get(first)), number(result.get(last))
    if after is None:
        return []
    return [
        (f"{decimal(before)} → {decimal(after)}" if before is not None else decimal(after), label)
    ]


def reward_card(run: Run) -> Html | None:
    """How well the reward model ranks, between its baselines and its ceiling."""
    s, reward = run.summary, run.reward
    if s.reward_accuracy is None:
        return None
    span = interval(s.reward_accuracy_low, s.reward_accuracy_high)
    shown = percent(s.reward_accuracy) + (f" ({span})" if span else "")
    rows = [
        Share(
            "This reward model", s.reward_accuracy, shown,
            s.reward_accuracy_low, s.reward_accuracy_high, main=True,
        )
    ]  # fmt: skip
    for label, value in (
        ("Always the longer answer", s.longer_wins_accuracy),
        ("Ceiling: a perfect scorer", s.reward_ceiling),
    ):
        if value is not None:
            rows.append(Share(label, value, percent(value)))
    # A shorter scale tells close figures apart; only a model that ranks backwards needs all of it.
    lowest = min(row.value if row.low is None else row.low for row in rows)
    start = SCALE_START if lowest > SCALE_START else 0.0
    facts = []
    chosen, rejected = number(reward.get("mean_chosen")), number(reward.get("mean_rejected"))
    if chosen is not None and rejected is not None:
        facts.append(
            f"Mean score {decimal(chosen)} for chosen and {decimal(rejected)} for rejected "
            f"answers, {decimal(chosen - rejected)} apart."
        )
    if number(reward.get("pairs")) is not None:
        facts.append(
            f"{count(reward['pairs'])} held-out pairs; the range is a {run.level} interval."
        )
    return join(
        [
            share_plot(rows, middle="a coin", start=start),
            tag("p", " ".join(facts)) if facts else None,
        ]
    )


def evaluation(run: Run) -> Html | None:
    """Every figure the evaluation wrote down, under its own key."""
    rows = [
        tag("div", tag("dt", key), tag("dd", plain(value)))
        for key, value in flat(run.result("evaluate"))
    ]
    return tag("dl", *rows) if rows else None


def caution(run: Run) -> Html | None:
    """What the figures give away, and the warnings that were printed while the run went on."""
    items: list[Html] = [tag("li", doubt) for doubt in doubts(run)]
    for stage in run.stages.values():
        for warning in stage.warnings:
            step = number(warning.get("step"))
            where = TITLES[stage.name] + (f", step {count(step)}" if step is not None else "")
            message = plain(warning.get("message"))
            items.append(tag("li", tag("b", where), ": ", message))
    return tag("ul", *items, class_="caution") if items else None


def configuration(run: Run) -> Html | None:
    """The resolved recipe, else what each stage recorded of it."""
    if run.recipe.strip():
        return tag("details", tag("summary", "recipe.yaml"), tag("pre", "\n" + run.recipe))
    recorded = [
        tag("details", tag("summary", TITLES[stage.name]), tag("pre", "\n" + written))
        for stage in run.stages.values()
        if (config := stage.part("config"))
        and (written := json.dumps(config, indent=2, ensure_ascii=False))
    ]
    return join(recorded) if recorded else None


def provenance(run: Run) -> Html | None:
    """Seeds, commits, versions, and the hashes of what went into each stage and came out."""
    finished = [stage for stage in run.stages.values() if stage.manifest]
    if not finished:
        return None
    origins = [
        _row(
            TITLES[stage.name],
            plain(stage.manifest.get("seed")),
            tag("code", str(stage.manifest.get("commit") or NONE)[:12]),
            _hashes(stage.part("inputs")),
        )
        for stage in finished
    ]
    outputs = [
        _row(f"{stage.name}/{path}", tag("code", str(digest)))
        for stage in finished
        for path, digest in stage.part("outputs").items()
    ]
    table = _table(("file", "SHA-256"), outputs, kind="text")
    return join(
        [
            _table(("stage", "seed", "commit", "inputs (SHA-256)"), origins, kind="text"),
            _versions(finished),
            tag("details", tag("summary", "Hashes of every output"), table) if outputs else None,
        ]
    )


def _versions(finished: list[Stage]) -> Html | None:
    """Each library once; several versions where the stages differ."""
    versions: dict[str, list[str]] = {}
    for stage in finished:
        for name, version in stage.part("versions").items():
            seen = versions.setdefault(name, [])
            if str(version) not in seen:
                seen.append(str(version))
    written = [tag("span", f"{name} {' / '.join(seen)}") for name, seen in sorted(versions.items())]
    return tag("p", *written, class_="versions") if written else None


def _hashes(entries: Row) -> Html:
    """Names with the first digits of their hash; the whole hash under the pointer.

    An input that is no file is recorded by its name, which is shown whole.
    """
    return join(
        [
            tag(
                "span",
                f"{name} ",
                tag("code", whole[:12] if len(whole) == HASH else whole, title=whole),
                class_="hash",
            )
            for name, whole in ((name, str(digest)) for name, digest in entries.items())
        ],
        " ",
    )


def flat(value: Row, prefix: str = "") -> list[tuple[str, object]]:
    """The leaves of nested objects with their path in words."""
    leaves: list[tuple[str, object]] = []
    for key, entry in value.items():
        path = f"{prefix} {spaced(str(key))}".strip()
        leaves += flat(entry, path) if isinstance(entry, dict) else [(path, entry)]
    return leaves


def _row(name: Content, *cells: Content) -> Html:
    return tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells))


def _table(headings: tuple[str, ...], rows: list[Html], kind: str = "numbers") -> Html:
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_=kind)
    return tag("div", table, class_="wide")
