"""Small helpers of the classic surface."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from suasion.classic.errors import ArgumentError
from suasion.models.roles import Policy
from suasion.rollout.sampler import Sampling, sample


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    transformers.set_seed(seed)


class LengthSampler:
    """Draws response lengths uniformly from `min_value` up to, but not including, `max_value`.

    Raises:
        ArgumentError: the interval is empty.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if not 0 < min_value < max_value:
            raise ArgumentError(
                f"LengthSampler({min_value}, {max_value}) has no length to draw from",
                "give 0 < min_value < max_value; max_value itself is never drawn",
            )
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """One length, in tokens."""
        return random.choice(self.values)  # noqa: S311 (not for secrets)


def respond_to_batch(
    model: Any, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample exactly `txt_len` tokens after each query, whatever is sampled.

    Args:
        model: A model with a value head, or a plain causal LM.
        queries: Token ids without padding, [B, Q].
        txt_len: Tokens to sample.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens up to this mass.

    Returns:
        Response tokens without the queries, [B, txt_len].
    """
    policy = Policy(getattr(model, "pretrained_model", model), temperature=1.0)
    count = len(queries)
    rollout = sample(
        policy,
        queries.tolist(),
        [txt_len] * count,
        list(torch.rand(count, txt_len, dtype=torch.float64)),
        stop_ids=[-1],  # no token: nothing ends a response early
        pad_id=0,
        sampling=Sampling(top_k=int(top_k), top_p=top_p),
    )
    return torch.tensor(rollout.responses, device=queries.device)


def as_numpy(value: Any) -> Any:
    """A tensor as trackers take it: one number as a float, more as an array."""
    if not isinstance(value, Tensor):
        return value
    array: np.ndarray[Any, Any] = value.detach().float().cpu().numpy()
    return float(array) if array.ndim == 0 else array
