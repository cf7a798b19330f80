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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from suasion.models.frozen import Workspace
from suasion.models.lowrank import LINEAR, is_plain
from suasion.models.roles import Policy

ROWS = 16
"""Rows that the order of a weight is chosen for; any number may come."""

Product = Callable[[Tensor], Tensor]
"""What stands for a layer's `forward`: inputs [..., in] -> outputs [..., out]."""


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
    convert = _Converter(torch.get_autocast_dtype(device))
    changed: list[Any] = []
    covered: set[nn.Module] = set()
    try:
        for module in policy.trunk.modules():
            if module in covered:
                continue
            product = convert.layer(module) or convert.adapted(module)
            if product is not None:
                module.forward = product
                changed.append(module)
                covered.update(module.modules())
        policy.decoding_head = convert.layer(policy.head)
        del convert  # its workspaces are as large as the largest weight
        yield
    finally:
        policy.decoding_head = None
        for module in changed:
            del module.forward


class _Converter:
    """Makes products of layers.

    Args:
        dtype: Of weights, inputs and outputs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rounded, self._turned = Workspace(), Workspace()

    def layer(self, layer: Any, more: Tensor | None = None) -> Product | None:
        """What a linear layer computes under autocast, with its weight converted beforehand.

        Args:
            layer: Any module; None is returned for one that is no plain linear layer in float32.
            more: Rows to compute with besides the weight's, [r, in]; there is no bias for them.
        """
        plain = type(layer) in LINEAR and "forward" not in vars(layer)
        if not plain or layer.weight.dtype is not torch.float32:
            return None
        dtype, data = self._dtype, layer.weight.data
        bias = None if layer.bias is None else layer.bias.data.to(dtype)
        if bias is not None and more is not None:
            bias = nn.functional.pad(bias, (0, len(more)))
        if not _can_order(data, dtype):
            weight = (data.t() if isinstance(layer, Conv1D) else data).to(dtype).contiguous()
            weight = weight if more is None else torch.cat([weight, more])
            return lambda x: nn.functional.linear(x.to(dtype), weight, bias)
        weight = self._rounded.unpacked(data, dtype)
        if isinstance(layer, Conv1D):
            weight = self._turned.unpacked(weight.t(), dtype)
        if more is not None:
            weight = torch.cat([weight, more])
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)  # noqa: SLF001
        product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        return lambda x: product(x.to(dtype), ordered, bias, "none", [], "")

    def adapted(self, layer: Any) -> Product | None:
        """The same of a layer with one adapter, whose two products are added to its own."""
        if not isinstance(layer, LoraLayer) or "forward" in vars(layer) or not is_plain(layer):
            return None
        (name,) = layer.active_adapters
        lora: Any = layer
        first = lora.lora_A[name].weight.data.to(self._dtype)
        second = (lora.lora_B[name].weight.data * lora.scaling[name]).to(self._dtype).t()
        both = self.layer(lora.get_base_layer(), first)
        if both is None:
            return None
        sizes = [second.shape[1], len(first)]

        def product(x: Tensor) -> Tensor:
            own, low = both(x).flatten(0, -2).split(sizes, dim=1)
            return torch.addmm(own, low, second).unflatten(0, x.shape[:-1])

        return product


def _can_order(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's own compiler would order such a weight (torch 2.8 to 2.13, oneDNN builds)."""
    return (
        weight.device.type == "cpu"
        and dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    )
