"""Health signals during a policy run: statistics so far in, warnings about the last iteration out.

A signal is a pure function of the rows of metrics.jsonl and says nothing while all is well. A
warning is given when its signal appears, not again in every iteration it lasts. Where no source
names a number, the threshold is ours and its docstring says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

Row = dict[str, float]
Signal = Callable[[Sequence[Row]], str | None]
"""(one row per iteration) -> what is wrong with the last, or None."""

KL_LOWEST = -1.0
"""Nats per response; huggingface/trl@v0.11.4, trl/trainer/ppo_trainer.py warns below it."""
KL_JUMP = 5.0
"""Factor in one iteration; a rule of thumb without a study behind it."""
KL_NOTICED = 1.0
"""Nats per response below which a jump is noise (ours)."""
RATIOS = (0.5, 2.0)
"""Mean probability ratio; TRL's guide calls 2.0 or 0.1 a bug."""
FIRST_KL = 0.01
"""Approximate KL of the first mini-batch, which is 0 by definition; bfloat16 makes up to 5e-4 of
it on random models (docs/checks.md)."""
CLIPPED = 0.3
"""Share of clipped tokens; ours. In vwxyzjn/summarize_from_feedback_details@ee77a9ab,
reference_output/ppo.txt it stays below 0.1."""
ENTROPY_LEFT = 0.2
"""Share of the first iterations' entropy; arXiv 2505.22617 shows that reward is bought with it
until none is left. The number is ours."""
LENGTH_GROWTH = 2.0
"""Factor over the first iterations; most of PPO's gain can be length (arXiv 2310.03716)."""
UNFINISHED = 0.25
"""Rise of the share of responses that never ended, since the first iterations (ours)."""
REPEATED = 0.2
"""Rise of the share of repeated four-word sequences, since the first iterations (ours)."""
FENCES = 2.0
"""Rise of the number of code fences per response: the hack of the StackLLaMA report."""
SPIKE = 10.0
"""Factor over the median of the last iterations, for value loss and gradient norm (ours); a
gradient spike precedes collapse in arXiv 2602.17616."""
EXPLAINED_AFTER = 20
"""Iterations after which a critic should explain some variance of the returns."""
STD_LEFT = 0.1
"""Share of the first iterations' spread of rewards (ours)."""
COEF_ROWS = 20
"""Iterations through which the KL coefficient must rise to count as rising steadily."""
COEF_GROWTH = 1.5
"""Factor it must rise by meanwhile; TRL's guide: a steady rise precedes instability."""
FIRST = 3
"""Iterations that count as the first ones."""
RECENT = 10
"""Iterations a median is taken over."""


def negative_kl(rows: Sequence[Row]) -> str | None:
    """The KL to the reference is below zero."""
    kl = rows[-1]["objective/kl"]
    if kl >= KL_LOWEST:
        return None
    return (
        f"the KL is {kl:.2f}, which a true KL never is: look at top_k, top_p, dropout and padding "
        "(suasion check)"
    )


def kl_jump(rows: Sequence[Row]) -> str | None:
    """The KL grew by a factor in one iteration."""
    if len(rows) < 2:
        return None
    before, now = rows[-2]["objective/kl"], rows[-1]["objective/kl"]
    if now < KL_JUMP * max(before, KL_NOTICED):
        return None
    return f"the KL jumped from {before:.2f} to {now:.2f} nats: lower the learning rate"


def first_ratio(rows: Sequence[Row]) -> str | None:
    """Rollout and update disagree before the first step of an iteration."""
    kl = rows[-1]["ppo/policy/first_approxkl"]
    if kl <= FIRST_KL:
        return None
    return (
        f"before its first step the update sees an approximate KL of {kl:.2g} to its own rollout: "
        "they compute different probabilities (suasion check --only ratio)"
    )


def mean_ratio(rows: Sequence[Row]) -> str | None:
    """The mean probability ratio is far from 1."""
    ratio = rows[-1]["ppo/policy/ratio"]
    if RATIOS[0] <= ratio <= RATIOS[1]:
        return None
    return f"the mean probability ratio is {ratio:.3g}: a bug, or a learning rate far too high"


def clipping(rows: Sequence[Row]) -> str | None:
    """Many tokens are clipped."""
    share = rows[-1]["ppo/policy/clipfrac"]
    if share <= CLIPPED:
        return None
    return f"{share:.0%} of the tokens are clipped: lower the learning rate or the epochs"


def entropy_collapse(rows: Sequence[Row]) -> str | None:
    """The policy hardly varies any more."""
    return _fell(
        rows,
        "ppo/policy/entropy",
        ENTROPY_LEFT,
        "the entropy per token fell from {first:.2f} to {now:.2f} nats: raise ppo.kl.coef or "
        "ppo.entropy",
    )


def reward_spread(rows: Sequence[Row]) -> str | None:
    """All responses are worth the same."""
    return _fell(
        rows,
        "env/reward_std",
        STD_LEFT,
        "the spread of the rewards fell from {first:.3g} to {now:.3g}: nothing is left to learn "
        "from, read the samples",
    )


def length_explosion(rows: Sequence[Row]) -> str | None:
    """Responses became much longer."""
    first, now = _first(rows, "tokens/responses_len_mean"), rows[-1]["tokens/responses_len_mean"]
    if len(rows) <= FIRST or now < LENGTH_GROWTH * first:
        return None
    return f"responses grew from {first:.0f} to {now:.0f} tokens: the reward may pay for length"


def unfinished(rows: Sequence[Row]) -> str | None:
    """Responses stopped ending by themselves."""
    return _rose(
        rows,
        "tokens/unfinished",
        UNFINISHED,
        "responses that never end rose from {first:.0%} to {now:.0%}: set score.no_eos to replace, "
        "or allow longer ones",
    )


def repetition(rows: Sequence[Row]) -> str | None:
    """Responses repeat themselves."""
    return _rose(
        rows,
        "text/repeated",
        REPEATED,
        "repeated phrases rose from {first:.0%} to {now:.0%} of the text: the reward has a hole, "
        "read the samples",
    )


def code_fences(rows: Sequence[Row]) -> str | None:
    """Code fences are spread over responses."""
    return _rose(
        rows,
        "text/code_fences",
        FENCES,
        "code fences rose from {first:.1f} to {now:.1f} per response: the reward may pay for them",
    )


def value_spike(rows: Sequence[Row]) -> str | None:
    """The critic's loss leapt."""
    return _spiked(rows, "ppo/loss/value", "the value loss", "scale or clip the scores (ppo.score)")


def gradient_spike(rows: Sequence[Row]) -> str | None:
    """The gradient leapt."""
    return _spiked(rows, "ppo/grad_norm", "the gradient norm", "lower the learning rate")


def unexplained_returns(rows: Sequence[Row]) -> str | None:
    """The critic is worse than a constant, and still is after many iterations."""
    if len(rows) < EXPLAINED_AFTER:
        return None
    explained = statistics.median(row["ppo/val/var_explained"] for row in rows[-RECENT:])
    if explained >= 0:
        return None
    return (
        f"the critic explains {explained:.2f} of the returns' variance, less than a constant "
        "would: raise critic.learning_rate or critic.warmup, or scale the scores"
    )


def rising_coefficient(rows: Sequence[Row]) -> str | None:
    """The KL coefficient rises all the time."""
    recent = [row["objective/kl_coef"] for row in rows[-COEF_ROWS:]]
    rises = all(later > earlier for earlier, later in pairwise(recent))
    if len(recent) < COEF_ROWS or not rises or recent[-1] < COEF_GROWTH * recent[0]:
        return None
    return (
        f"the KL coefficient rose in each of {COEF_ROWS} iterations, to {recent[-1]:.3g}, and does "
        "not hold the policy: lower the learning rate or raise kl.target"
    )


SIGNALS: tuple[Signal, ...] = (
    negative_kl,
    kl_jump,
    first_ratio,
    mean_ratio,
    clipping,
    entropy_collapse,
    reward_spread,
    length_explosion,
    unfinished,
    repetition,
    code_fences,
    value_spike,
    gradient_spike,
    unexplained_returns,
    rising_coefficient,
)
"""Every signal, in the order warnings are given."""


def warnings_about(rows: Sequence[Row]) -> list[str]:
    """What appeared in the last iteration.

    Args:
        rows: Statistics of every iteration so far, oldest first; see docs/checks.md.
    """
    before = rows[:-1]
    return [
        message
        for signal in SIGNALS
        if (message := signal(rows)) is not None and not (before and signal(before))
    ]


def _first(rows: Sequence[Row], name: str) -> float:
    return statistics.median(row[name] for row in rows[:FIRST])


def _fell(rows: Sequence[Row], name: str, left: float, message: str) -> str | None:
    first, now = _first(rows, name), rows[-1][name]
    if len(rows) <= FIRST or now >= left * first:
        return None
    return message.format(first=first, now=now)


def _rose(rows: Sequence[Row], name: str, by: float, message: str) -> str | None:
    first, now = _first(rows, name), rows[-1][name]
    if len(rows) <= FIRST or now < first + by:
        return None
    return message.format(first=first, now=now)


def _spiked(rows: Sequence[Row], name: str, title: str, fix: str) -> str | None:
    if len(rows) <= RECENT:
        return None
    usual, now = statistics.median(row[name] for row in rows[-RECENT - 1 : -1]), rows[-1][name]
    if usual <= 0 or now < SPIKE * usual:
        return None
    return f"{title} leapt to {now:.3g} from a usual {usual:.3g}: {fix}"
