"""Which metrics are drawn, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass

from suasion.evaluate.report.charts import Series, line_chart
from suasion.evaluate.report.load import Row, Run, Stage
from suasion.evaluate.report.markup import Html, join, tag
from suasion.evaluate.report.wording import number


@dataclass(frozen=True)
class Chart:
    """One chart: a title and the metric behind each curve."""

    title: str
    curves: tuple[tuple[str, tuple[str, ...]], ...]
    """(legend, metric names: the first one present is drawn)."""
    unit: str = ""
    note: str = ""


POLICY = (
    Chart("Reward", (("mean score", ("env/reward_mean", "ppo/mean_scores")),), "score"),
    Chart("KL from the reference", (("per answer", ("objective/kl",)),), "nats"),
    Chart("KL coefficient", (("β", ("objective/kl_coef",)),), "score per nat"),
    Chart("Value loss", (("critic", ("ppo/loss/value",)),)),
    Chart("Entropy", (("per answer", ("objective/entropy",)),), "nats"),
    Chart("Answer length", (("mean", ("tokens/responses_len_mean",)),), "tokens"),
)
"""Always shown, in this order."""

POLICY_DETAILS = (
    Chart("Policy loss", (("clipped surrogate", ("ppo/loss/policy",)),)),
    Chart("Ratios clipped", (("share of tokens", ("ppo/policy/clipfrac",)),)),
    Chart("Change per step", (("approximate KL", ("ppo/policy/approxkl",)),), "nats"),
    Chart("Variance explained by the critic", (("share", ("ppo/val/var_explained",)),)),
    Chart("Spread of rewards", (("standard deviation", ("env/reward_std",)),), "score"),
    Chart("KL penalty", (("mean per token", ("ppo/mean_non_score_reward",)),), "score"),
    Chart("Entropy per token", (("policy", ("ppo/policy/entropy",)),), "nats"),
    Chart("Answers cut at the length limit", (("share", ("tokens/unfinished",)),)),
)
"""Shown on request."""

LOSSES = (("training", ("loss",)), ("held out", ("eval_loss",)))
TRAINING = {
    "pretrain": (Chart("Pretraining loss", LOSSES, "nats per token"),),
    "sft": (Chart("Fine-tuning loss", LOSSES, "nats per token"),),
    "reward": (
        Chart("Reward-model loss", LOSSES, "nats per pair"),
        Chart("Reward-model accuracy", (("held out", ("eval_accuracy",)),), "share of pairs"),
    ),
}
"""Stages trained by gradient descent on data, in running order."""


def policy_curves(run: Run) -> Html | None:
    """The charts of PPO, or None without its metrics."""
    stage = run.stages.get("ppo")
    main = _drawn(stage, POLICY)
    more = _drawn(stage, POLICY_DETAILS)
    if not main and not more:
        return None
    details = tag("details", tag("summary", "More curves"), tag("div", *more, class_="charts"))
    return join([tag("div", *main, class_="charts"), details if more else None])


def training_curves(run: Run) -> Html | None:
    """The charts of pretraining, fine-tuning and the reward model, or None without any."""
    charts = [
        chart for name, specs in TRAINING.items() for chart in _drawn(run.stages.get(name), specs)
    ]
    return tag("div", *charts, class_="charts") if charts else None


def _drawn(stage: Stage | None, specs: tuple[Chart, ...]) -> list[Html]:
    if stage is None:
        return []
    charts = [
        line_chart(
            spec.title,
            [Series(legend, _points(stage.metrics, names)) for legend, names in spec.curves],
            unit=spec.unit,
            note=spec.note,
        )
        for spec in specs
    ]
    return [chart for chart in charts if chart]


def _points(rows: list[Row], names: tuple[str, ...]) -> tuple[tuple[float, float | None], ...]:
    """(step, value) of the first of `names` that any row has; a resumed run's rows in order."""
    name = next((name for name in names if any(name in row for row in rows)), None)
    found = {
        step: number(row[name])
        for row in rows
        if name in row and (step := number(row.get("step"))) is not None
    }
    return tuple(sorted(found.items(), key=lambda point: point[0]))
