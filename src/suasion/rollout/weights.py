"""Weights in the form in which one token at a time runs fastest, while responses are sampled.

Decoding multiplies a few rows by every weight, again and again. Under reduced precision each
multiplication would first convert a whole weight; and processors read a weight faster along one of
its two axes (docs/benchmarks.md). So the linear layers are converted once for a rollout, and given
back their own weights after it. Results are those of the layer's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from suasion.models.roles import Policy


@contextmanager
def decoding_weights(policy: Policy) -> Iterator[None]:
    """Hold the float32 weights of linear layers as decoding wants them.

    In bf16 with inputs side by side if the surrounding autocast asks for bf16; else, on a
    processor, in float32 with outputs side by side. Takes the memory of one more copy of them.
    The output head is copied, for it may share its weight with the embedding. Frozen weights keep
    their float32 form: where only adapters learn, a copy of them would be what takes most memory.

    Args:
        policy: The model that is about to decode.
    """
    device = policy.device.type
    half = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if half else torch.float32
    if device != "cpu" and not half:
        yield
        return
    kept: list[tuple[Any, Tensor]] = []
    try:
        for module in policy.trunk.modules():
            if not isinstance(module, nn.Linear | Conv1D) or not _converts(module.weight, half):
                continue
            weight, inputs_last = module.weight, isinstance(module, nn.Linear)
            kept.append((weight, weight.data))
            weight.data = _along(weight.data.to(dtype), last=inputs_last is half)
        if type(policy.head) is nn.Linear and _converts(policy.head.weight, half):
            policy.decoding_head = _along(policy.head.weight.data.to(dtype), last=half)
        yield
    finally:
        policy.decoding_head = None
        for weight, data in kept:
            weight.data = data


def _converts(weight: Tensor, half: bool) -> bool:  # noqa: FBT001
    return weight.dtype is torch.float32 and (half or weight.requires_grad)


def _along(weight: Tensor, *, last: bool) -> Tensor:
    """The same matrix, in memory along its last or its first axis."""
    return weight.contiguous() if last else weight.t().contiguous().t()
