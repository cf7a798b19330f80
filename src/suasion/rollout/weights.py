"""Linear layers in the form in which one token at a time runs fastest, while responses are sampled.

Decoding multiplies a few rows by every weight, again and again. Under autocast each multiplication
would first convert a whole weight to bf16, and on a processor then bring it into the order its
instructions want, which takes longer than the product. So both are done once for a rollout. The
products are the same: weights rounded to bf16, sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from suasion.models.roles import Policy

ROWS = 16
"""Rows that the order of a weight is chosen for; any number may come."""


@contextmanager
def decoding_weights(policy: Policy) -> Iterator[None]:
    """Hold a second copy of the float32 weights of linear layers, in bf16, if autocast asks for it.

    Args:
        policy: The model that is about to decode.
    """
    device = policy.device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    changed: list[Any] = []
    try:
        for module in policy.trunk.modules():
            plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
            if plain and module.weight.dtype is torch.float32:
                module.forward = _converted(module, dtype)
                changed.append(module)
        if type(policy.head) is nn.Linear and policy.head.weight.dtype is torch.float32:
            policy.decoding_head = _converted(policy.head, dtype)
        yield
    finally:
        policy.decoding_head = None
        for module in changed:
            del module.forward


def _converted(layer: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What `layer` computes under autocast, with its weight converted beforehand."""
    data = layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data
    weight = data.to(dtype).contiguous()
    bias = None if layer.bias is None else layer.bias.data.to(dtype)
    if not _can_order(weight):
        return lambda x: nn.functional.linear(x.to(dtype), weight, bias)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)  # noqa: SLF001
    product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
    return lambda x: product(x.to(dtype), ordered, bias, "none", [], "")


def _can_order(weight: Tensor) -> bool:
    """Whether torch's own compiler would order this weight (torch 2.8 to 2.13, oneDNN builds)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    )
