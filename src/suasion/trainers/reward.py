"""Reward model: which of two answers do people prefer?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset

from suasion.config.schema import RewardConfig
from suasion.core.errors import DataError
from suasion.core.ranks import ALONE, Ranks
from suasion.core.records import TokenBatch, token_batch
from suasion.core.seeding import seed_of
from suasion.data.codec import Codec
from suasion.data.sources import Source
from suasion.functional.preference import pairwise_loss
from suasion.models.adapters import add_lora
from suasion.models.load import (
    context_of,
    device_for_training,
    load_codec,
    new_reward_model,
    rest_dtype,
    score_head,
    switch_off_dropout,
)
from suasion.models.quantised import check_held
from suasion.models.roles import HiddenStates
from suasion.rollout.rewards import RewardModel
from suasion.trainers.fit import fit
from suasion.trainers.sft import save_trained

TokenPair = tuple[list[int], list[int], list[int]]
"""Prompt, chosen answer, rejected answer."""


class Pairs(Dataset[TokenPair]):
    """Pairs of answers as tokens."""

    def __init__(self, rows: list[TokenPair], pad_id: int) -> None:
        self._rows = rows
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenPair:
        return self._rows[index]

    def collate(self, rows: list[TokenPair]) -> dict[str, Any]:
        """One batch, the chosen answers in its first half and the rejected in its second."""
        prompts = [prompt for prompt, _, _ in rows]
        answers = [chosen for _, chosen, _ in rows] + [rejected for _, _, rejected in rows]
        batch = token_batch(prompts + prompts, answers, self._pad_id)
        return {"input_ids": batch.ids, "attention_mask": batch.mask}


def scoring_states(model: Any) -> HiddenStates:
    """A classifier as trunk and scoring head, where an adapter may train a copy of the head."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    head = getattr(plain, "score", None)
    return HiddenStates(model, head if head is not None else score_head(plain))


def preference_loss(states: HiddenStates, center: float, batch: dict[str, Any]) -> torch.Tensor:
    """Mean pairwise loss of a batch of `Pairs`, with the weight of the centring term."""
    mask = batch["attention_mask"]
    texts = TokenBatch(batch["input_ids"], mask, torch.zeros_like(mask))
    ends = states.at(texts, texts.ends)
    scores = states.head(ends.to(next(states.head.parameters()).dtype)).squeeze(-1)
    chosen, rejected = scores.float().chunk(2)
    return pairwise_loss(chosen, rejected, centring=center).mean()


def reward(
    config: RewardConfig,
    folder: Path,
    *,
    seed: int,
    console: Console,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a reward model on pairs. Writes `model/` (and `adapter/`).

    Returns:
        Counts of pairs and steps; the accuracy is for the caller, who has the intervals.
    """
    assert config.model is not None
    assert config.data is not None
    check_held(config.lora.base, adapters=config.lora.r > 0, where="reward")
    codec = load_codec(config.model, config.template)
    device = device_for_training()
    model: Any = new_reward_model(
        config.model,
        codec.pad_id,
        rest_dtype(config.lora.base, config.precision),
        seed=seed_of(seed, "reward head"),
        held=config.lora.base,
    )
    switch_off_dropout(model)
    limit = min(config.max_length or context_of(model.config), context_of(model.config))
    source = Source(Path(config.data))
    found = source.pairs("reward")
    rows = token_pairs(found, codec, limit, config.too_long, config.data)
    if config.lora.r:
        model = add_lora(model, config.lora, seed=seed_of(seed, "adapter"), head=True)
    model.to(device)
    pairs = Pairs(rows, codec.pad_id)

    outcome = fit(
        model,
        pairs,
        pairs.collate,
        partial(preference_loss, scoring_states(model), config.center),
        config,
        folder=folder,
        seed=seed,
        console=console,
        title="reward",
        ranks=ranks,
        lengths=[len(prompt) + max(len(one), len(two)) for prompt, one, two in rows],
    )
    if ranks.first:
        save_trained(folder, model, codec.tokenizer, config.template, config.lora)
    return {"training_pairs": len(rows), "pairs_left_out": len(found) - len(rows), **outcome}


def token_pairs(
    rows: list[dict[str, Any]], codec: Codec, limit: int, too_long: str, where: str
) -> list[TokenPair]:
    """Pairs as tokens, at most `limit` per text.

    Raises:
        DataError: a pair is too long and `too_long` is "error", or none is left.
    """
    kept: list[TokenPair] = []
    shortest = len(codec.prompt_ids(""))
    for number, row in enumerate(rows):
        chosen, rejected = codec.judged_ids(row["chosen"]), codec.judged_ids(row["rejected"])
        room = limit - max(len(chosen), len(rejected))
        if room < shortest and too_long != "error":
            continue
        query = codec.fit_query(row["query"], room, too_long, f"{where}, pair {number}")  # type: ignore[arg-type]
        if query is not None:
            kept.append((codec.prompt_ids(query), chosen, rejected))
    if not kept:
        raise DataError(
            f"{where}: no pair fits into {limit} tokens", "cut queries or take a longer context"
        )
    return kept


def pair_scores(judge: RewardModel, rows: list[TokenPair]) -> tuple[list[float], list[float]]:
    """Scores of the chosen and of the rejected answers."""
    texts = [(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows]
    scores = judge.score_tokens(texts)
    return scores[: len(rows)], scores[len(rows) :]
