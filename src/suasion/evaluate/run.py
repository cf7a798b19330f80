"""The evaluation stage: perplexity, the reward model's card, two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from suasion.config.schema import EvaluateConfig
from suasion.core.errors import ConfigError
from suasion.core.files import keep_json_lines
from suasion.core.progress import Meter
from suasion.core.records import token_batch
from suasion.core.seeding import seed_of
from suasion.data.codec import Codec
from suasion.data.sources import Source, documents, fitting, spread
from suasion.evaluate.answering import Answers, answer
from suasion.evaluate.reward_card import held_out_pairs, reward_card
from suasion.evaluate.statistics import win_rate
from suasion.models.likelihood import perplexity
from suasion.models.load import context_of, device_for_training, load_causal_lm, load_codec
from suasion.models.roles import Policy
from suasion.rollout.experience import token_budget
from suasion.rollout.rewards import Checked, RewardModel, load_reward


def evaluate(
    config: EvaluateConfig, folder: Path, *, seed: int, console: Console
) -> dict[str, Any]:
    """Evaluate a run. Writes comparisons.jsonl.

    Returns:
        Figures by name; what does not apply is left out.
    """
    assert config.data is not None
    source = Source(Path(config.data))
    result: dict[str, Any] = {}
    if source.prepared:
        result |= _perplexities(config, source)
    reward = load_reward(config.reward, config.template) if config.reward else None
    gold = load_reward(config.gold, config.template) if config.gold else None
    if source.prepared and reward is not None and isinstance(reward.reward, RewardModel):
        pairs = held_out_pairs(source, config.evaluation_pairs)
        limit = reward.reward.context
        card = reward_card(reward, pairs, level=config.level, max_length=limit)
        result["reward"] = card.as_dict()
        if gold is not None:
            ceiling = reward_card(gold, pairs, level=config.level, max_length=None)
            result["reward_ceiling"] = ceiling.accuracy
    if config.before and config.after:
        compared, rows = _compare(config, source, reward, gold, seed=seed, console=console)
        keep_json_lines(folder / "comparisons.jsonl", rows)
        result["compare"] = compared
    return result


def _perplexities(config: EvaluateConfig, source: Source) -> dict[str, float]:
    found = {}
    for key, model in (
        ("perplexity_before", config.start),
        ("perplexity_after", config.perplexity_of),
    ):
        if model:
            codec = load_codec(model, config.template)
            policy = _load(model, 1.0)
            limit = context_of(policy.model.config)
            rows = spread(source.answers("evaluation", best=False), config.evaluation_rows)
            texts = [d for d in documents(codec, rows) if len(d) <= limit]
            found[key] = perplexity(policy, texts, pad_id=codec.pad_id)
    return found


def _load(source: str, temperature: float) -> Policy:
    model: Any = load_causal_lm(source)
    return Policy(model.to(device_for_training()), temperature)


def _compare(
    config: EvaluateConfig,
    source: Source,
    reward: Checked | None,
    gold: Checked | None,
    *,
    seed: int,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let both models answer the same held-out prompts and score the answers."""
    assert config.before is not None
    assert config.after is not None
    judge = gold or reward
    if judge is None:
        raise ConfigError(
            "evaluate compares two models but has nothing to judge them by",
            "set evaluate.reward or evaluate.gold",
        )
    temperature = config.response.temperature
    before, after = _load(config.before, temperature), _load(config.after, temperature)
    codec = load_codec(config.before, config.template)
    room = context_of(before.model.config) - config.response.max_tokens
    found = spread(source.queries("evaluation"), config.prompts)
    queries = fitting(found, codec, room, config.too_long, config.data or "")
    with Meter(console, "answering", 2 * len(queries), "answer") as meter:
        number = seed_of(seed, "evaluate")
        one = answer(before, codec, queries, config.response, seed=number, meter=meter)
        two = answer(after, codec, queries, config.response, seed=number, meter=meter)
    judged: dict[str, tuple[list[float], list[float]] | None] = {
        name: (scorer(queries, one.texts), scorer(queries, two.texts)) if scorer else None
        for name, scorer in (("score", reward), ("gold", gold))
    }
    decisive = judged["gold"] or judged["score"]
    assert decisive is not None
    wins = win_rate(*decisive, level=config.level, seed=seed_of(seed, "bootstrap") % 2**32)
    compared: dict[str, Any] = {
        "a": config.before,
        "b": config.after,
        "prompts": len(queries),
        "win_rate": wins.rate,
        "win_rate_low": wins.low,
        "win_rate_high": wins.high,
        "win_by": "gold" if gold else "score",
        "length_a": _mean(one.lengths),
        "length_b": _mean(two.lengths),
        "kl": sampled_kl(two, before, codec),
    }
    rows: list[dict[str, Any]] = [
        {
            "query": query,
            "response_a": one.texts[i],
            "response_b": two.texts[i],
            "length_a": one.lengths[i],
            "length_b": two.lengths[i],
        }
        for i, query in enumerate(queries)
    ]
    for name, scores in judged.items():
        for side, values in zip("ab", scores or ([], []), strict=True):
            compared[f"{name}_{side}"] = _mean(values) if values else None
            for i, row in enumerate(rows):
                row[f"{name}_{side}"] = values[i] if values else None
    return compared, rows


@torch.no_grad()
def sampled_kl(answers: Answers, reference: Policy, codec: Codec) -> float:
    """KL of the answering model to `reference`, by k1 on its own answers; nats per response."""
    total, count = 0.0, 0
    for rollout in answers.rollouts:
        lengths = [len(q) + len(r) for q, r in zip(rollout.queries, rollout.responses, strict=True)]
        for rows in token_budget(lengths, 8192):
            batch = token_batch(
                [rollout.queries[i] for i in rows],
                [rollout.responses[i] for i in rows],
                codec.pad_id,
            )
            held_to = reference.logprobs(batch.to(reference.device))[0]
            own = torch.cat([rollout.logprobs[i] for i in rows]).to(held_to.device)
            total += float((own - held_to).sum())
            count += len(rows)
    return total / count


def _mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values)
