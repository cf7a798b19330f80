"""What a run achieved, in one sentence, and what should make one doubt it."""

from __future__ import annotations

from suasion.evaluate.report.load import Run, Stage
from suasion.evaluate.report.wording import count, decimal, number, percent

LENGTH_GROWTH = 1.5
"""Answers this many times longer after PPO are worth a remark: length is the cheapest reward."""
CUT = 0.5
"""Share of answers without an end from which on the policy is judged on fragments."""
KL_FLOOR = -0.05
"""Nats. KL estimated from samples may dip a little below zero; further down is a fault."""


def judge(run: Run) -> str:
    """Who decided the comparison: the gold scorer, or the reward model PPO was trained on."""
    named = run.compare.get("win_by")
    if named in ("gold", "score"):
        return str(named)
    return "gold" if run.summary.gold_ppo is not None else "score"


def verdict(run: Run) -> str:
    """One sentence on the furthest result the run reached."""
    for sentence in (_compared, _policy, _reward_model, _tuned):
        if written := sentence(run):
            return written
    return "This run has prepared its data; nothing has been trained yet."


def _compared(run: Run) -> str:
    """PPO's answers against those before it."""
    s = run.summary
    if s.win_rate is None:
        return ""
    prompts = number(run.compare.get("prompts"))
    where = f"{count(prompts)} held-out prompts" if prompts else "held-out prompts"
    by = (
        "judged by the gold scorer, which training never saw"
        if judge(run) == "gold"
        else "judged by the reward it was trained on"
    )
    share = f"{percent(s.win_rate)} of {where}"
    if s.win_rate_low is not None and s.win_rate_low > 0.5:
        return f"PPO made the answers better: they win on {share}, {by}."
    if s.win_rate_high is not None and s.win_rate_high < 0.5:
        return f"PPO made the answers worse: they win on only {share}, {by}."
    if s.win_rate_low is None or s.win_rate_high is None:
        return f"After PPO the answers win on {share}, {by}."
    return f"PPO made no difference that can be told from chance: a win on {share}, {by}."


def _policy(run: Run) -> str:
    """Reward during PPO, where nothing was compared afterwards."""
    result = run.result("ppo")
    first, last = number(result.get("score_first")), number(result.get("score_last"))
    if first is None or last is None:
        return ""
    rose = "rose" if last > first else "fell" if last < first else "stayed"
    steps, kl = number(result.get("steps")), number(result.get("kl_last"))
    during = f" in {count(steps)} steps of PPO" if steps else " during PPO"
    cost = f", at {decimal(kl)} nats from the reference" if kl is not None else ""
    return f"The mean score {rose} from {decimal(first)} to {decimal(last)}{during}{cost}."


def _reward_model(run: Run) -> str:
    """How well the reward model ranks pairs."""
    s = run.summary
    if s.reward_accuracy is None:
        return ""
    pairs = number(run.reward.get("pairs"))
    where = f"{count(pairs)} held-out pairs" if pairs else "held-out pairs"
    return f"The reward model prefers the chosen answer in {percent(s.reward_accuracy)} of {where}."


def _tuned(run: Run) -> str:
    """Perplexity after fine-tuning."""
    before, after = run.summary.perplexity_before, run.summary.perplexity_after
    if before is None or after is None:
        return ""
    change = "lowered" if after < before else "raised" if after > before else "left"
    return (
        f"Fine-tuning {change} perplexity on held-out text from {decimal(before)} "
        f"to {decimal(after)}."
    )


def doubts(run: Run) -> list[str]:
    """Reasons, found in the figures, to think twice about the result."""
    s = run.summary
    found = []
    if s.win_rate is not None and judge(run) == "score":
        found.append(
            "The win rate is measured with the reward that PPO was trained on. It shows that "
            "training worked, not that people would agree."
        )
    if None not in (s.score_sft, s.score_ppo, s.gold_sft, s.gold_ppo) and (
        _rose(s.score_sft, s.score_ppo) and not _rose(s.gold_sft, s.gold_ppo)
    ):
        found.append(
            "The reward model's score rose while the gold score did not: over-optimisation. "
            "Stop earlier, or hold the policy closer with a larger KL coefficient."
        )
    before, after = number(run.compare.get("length_a")), number(run.compare.get("length_b"))
    if before and after and after > LENGTH_GROWTH * before:
        found.append(
            f"Answers grew from {decimal(before)} to {decimal(after)} tokens. Part of the gain "
            "may be length."
        )
    low, longer = s.reward_accuracy_low, s.longer_wins_accuracy
    if low is not None and longer is not None and low <= longer:
        found.append(
            f"The reward model's interval starts at {percent(low)} and so does not clear the "
            f"{percent(longer)} of always preferring the longer answer."
        )
    return found + _from_curves(run.stages.get("ppo"))


def _rose(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


def _from_curves(ppo: Stage | None) -> list[str]:
    """What the curves of PPO give away."""
    rows = ppo.metrics if ppo else []
    found = []
    kls = [(row.get("step"), number(row.get("objective/kl"))) for row in rows]
    below = [(step, kl) for step, kl in kls if kl is not None and kl < KL_FLOOR]
    if below:
        step, kl = min(below, key=lambda pair: pair[1])
        found.append(
            f"KL went below zero (lowest {decimal(kl)} nats at step {count(step)}). True KL never "
            "does: sampling and training disagree about the distribution, by padding, a forced "
            "length, a suppressed end token or truncated sampling."
        )
    cut = [share for row in rows if (share := number(row.get("tokens/unfinished"))) is not None]
    if cut and cut[-1] > CUT:
        found.append(
            f"{percent(cut[-1])} of the answers of the last step were cut at the length limit: the "
            "model seldom ends what it says."
        )
    names = {key for row in rows for key, value in row.items() if _broken(value)}
    if names:
        found.append(f"Not finite at some step: {', '.join(sorted(names))}.")
    return found


def _broken(value: object) -> bool:
    return isinstance(value, float) and number(value) is None
