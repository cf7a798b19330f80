"""What a script hands to `step`, looked at before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suasion.classic.errors import ArgumentError
from suasion.core.errors import RewardError


@dataclass(frozen=True)
class StepBatch:
    """One batch of B responses; lengths are those of the tensors given, whatever they hold."""

    queries: list[list[int]]
    """Prompt tokens."""
    responses: list[list[int]]
    """Response tokens."""
    scores: Tensor
    """What each response is worth, float32, [B]."""
    counts: list[Tensor] | None
    """For each response, True at tokens that count, bool; None: all do."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, query and response."""
        return [len(q) + len(r) for q, r in zip(self.queries, self.responses, strict=True)]


def checked_batch(
    queries: Any, responses: Any, scores: Any, response_masks: Any, batch_size: int
) -> StepBatch:
    """Check the arguments of `step` and take them apart.

    Args:
        queries: List of 1-D token tensors.
        responses: List of 1-D token tensors.
        scores: List of tensors with one number each.
        response_masks: None, or a list of 1-D tensors as long as the responses.
        batch_size: How many there must be.

    Raises:
        ArgumentError: names the argument, the row, and what it is instead.
        RewardError: a score is not a finite number.
    """
    named = {"queries": queries, "responses": responses, "scores": scores}
    if response_masks is not None:
        named["response_masks"] = response_masks
    for name, rows in named.items():
        _check_list(name, rows, batch_size)
    for name in ("queries", "responses"):
        for row, tokens in enumerate(named[name]):
            _check_tokens(name, row, tokens)
    return StepBatch(
        [query.tolist() for query in queries],
        [response.tolist() for response in responses],
        torch.stack([_score(row, score) for row, score in enumerate(scores)]),
        None if response_masks is None else _counts(responses, response_masks),
    )


def _check_list(name: str, rows: Any, batch_size: int) -> None:
    if not isinstance(rows, list):
        hint = f"write [tensor for tensor in {name}]" if isinstance(rows, Tensor) else ""
        raise ArgumentError(f"{name} must be a list of tensors, not {type(rows).__name__}", hint)
    if len(rows) != batch_size:
        raise ArgumentError(
            f"{name} has {len(rows)} entries, PPOConfig.batch_size is {batch_size}",
            "give step exactly batch_size entries (a DataLoader with drop_last=True does)",
        )
    for row, entry in enumerate(rows):
        if not isinstance(entry, Tensor):
            raise ArgumentError(
                f"{name}[{row}] is a {type(entry).__name__}, not a tensor",
                f"write torch.tensor({name}[{row}])",
            )


def _check_tokens(name: str, row: int, tokens: Tensor) -> None:
    if tokens.ndim != 1:
        raise ArgumentError(
            f"{name}[{row}] has shape {tuple(tokens.shape)}, it must have one axis",
            "squeeze the batch axis away",
        )
    if tokens.is_floating_point():
        raise ArgumentError(f"{name}[{row}] holds {tokens.dtype}, not token ids")
    if not len(tokens):
        raise ArgumentError(
            f"{name}[{row}] is empty",
            "a response ends with its EOS token, keep it; leave an empty query out of the batch"
            if name == "responses"
            else "give the query at least one token, the BOS token for one",
        )


def _score(row: int, score: Tensor) -> Tensor:
    if score.numel() != 1 or score.ndim > 1:
        raise ArgumentError(
            f"scores[{row}] has shape {tuple(score.shape)}, it must be one number",
            "give one score per response; per-token rewards are not what step takes",
        )
    number = score.detach().reshape(()).float().cpu()
    if not torch.isfinite(number):
        raise RewardError(f"scores[{row}] is {number.item()}", "give a finite number")
    return number


def _counts(responses: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    for row, (response, mask) in enumerate(zip(responses, masks, strict=True)):
        if mask.shape != response.shape:
            raise ArgumentError(
                f"response_masks[{row}] has shape {tuple(mask.shape)}, "
                f"responses[{row}] has {tuple(response.shape)}",
                "give one entry per response token, 1 where it counts",
            )
        if not bool(mask.bool().any()):
            raise ArgumentError(f"response_masks[{row}] counts no token of its response")
    return [mask.bool().cpu() for mask in masks]
