"""Batched generation with transformers' own `generate`, and lengths that do not rest on padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from suasion.classic.errors import ArgumentError


@torch.no_grad()
def generate_responses(
    model: Any,
    queries: Sequence[Tensor],
    *,
    stop_ids: Iterable[int],
    pad_id: int,
    batch_size: int,
    return_prompt: bool,
    length_sampler: Callable[[], int] | None,
    options: dict[str, Any],
) -> list[Tensor]:
    """Generate one response for each query.

    A response ends after its first stop token, which belongs to it; `generate` writes nothing but
    padding after that, so the cut is right even where padding and EOS are one token.

    Args:
        model: A transformers or peft causal LM.
        queries: 1-D token tensors.
        stop_ids: Tokens that end a response.
        pad_id: Fills shorter queries on the left.
        batch_size: Queries at a time.
        return_prompt: Put the query in front of its response.
        length_sampler: Draws `max_new_tokens`, once per batch.
        options: For `generate`.

    Returns:
        1-D token tensors in the order of the queries, on the model's device.
    """
    stops = torch.tensor(sorted(stop_ids), device=model.device)
    found: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(queries), batch_size):
            part = [query.to(model.device) for query in queries[start : start + batch_size]]
            ids, mask = _left_padded(part, pad_id)
            chosen = dict(options)
            if length_sampler is not None:
                chosen["max_new_tokens"] = length_sampler()
            out = model.generate(input_ids=ids, attention_mask=mask, **chosen)
            if len(out) != len(part):
                raise ArgumentError(
                    f"generate gave {len(out)} sequences for {len(part)} queries",
                    "leave num_return_sequences at 1; repeat the query instead",
                )
            for query, row in zip(part, out[:, ids.shape[1] :], strict=True):
                response = row[: _length(row, stops)]
                found.append(torch.cat([query, response]) if return_prompt else response)
    return found


def generation_options(kwargs: dict[str, Any], stop_ids: list[int], pad_id: int) -> dict[str, Any]:
    """Arguments of `generate` as this transformers takes them.

    Scripts of 2023 write `"top_k": 0.0` and `"min_length": -1` for "no limit".

    Args:
        kwargs: As the script gave them.
        stop_ids: Tokens that end a response.
        pad_id: Written behind ended responses.
    """
    options = {"pad_token_id": pad_id, "eos_token_id": stop_ids, **kwargs}
    if options.get("top_k") is not None:
        options["top_k"] = int(options["top_k"])
    if options.get("min_length", 0) <= 0:
        options.pop("min_length", None)
    return options


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside the block: with gradient checkpointing, training mode has no cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _left_padded(queries: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(query) for query in queries)
    ids = torch.full((len(queries), longest), pad_id, device=queries[0].device)
    mask = torch.zeros_like(ids)
    for row, query in enumerate(queries):
        ids[row, longest - len(query) :] = query
        mask[row, longest - len(query) :] = 1
    return ids, mask


def _length(row: Tensor, stops: Tensor) -> int:
    ends = torch.isin(row, stops).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(row)
