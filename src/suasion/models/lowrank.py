"""Layers with an adapter, computed as one function under autocast.

peft calls the layer and the adapter's two products one after the other. Under autocast the input is
then converted up to three times and the output passed over three more times, which on a small rank
takes longer than the products. The numbers are the same but for one rounding less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""Layers whose product is known here; quantised ones have their own."""


def is_plain(layer: Any) -> bool:
    """Whether a layer with adapters computes `base(x) + scaling * B(A(x))` and nothing else."""
    names = layer.active_adapters
    return (
        len(names) == 1
        and names[0] in layer.lora_A
        and not layer.disable_adapters
        and not layer.merged
        and not layer.lora_variant
        and layer.lora_B[names[0]].bias is None
        and not (layer.training and getattr(layer.lora_dropout[names[0]], "p", 0.0))
    )


@contextmanager
def adapters_at_once(*models: nn.Module) -> Iterator[None]:
    """Let layers with one plain adapter on frozen weights compute both together under autocast.

    Which adapter is active is asked at every call. Everything else is computed as before.

    Args:
        models: May share layers.
    """
    changed: list[Any] = []
    try:
        for layer in {module: None for model in models for module in model.modules()}:
            if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) in LINEAR:
                own: Any = layer
                own.forward = partial(_forward, layer, own.forward)
                changed.append(own)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _forward(layer: Any, usual: Any, x: Tensor, *more: Any, **named: Any) -> Any:
    device = x.device.type
    base = layer.get_base_layer()
    if more or named or not torch.is_autocast_enabled(device) or not is_plain(layer):
        return usual(x, *more, **named)
    (name,) = layer.active_adapters
    first, second = layer.lora_A[name], layer.lora_B[name]
    learns = any(parameter.requires_grad for parameter in base.parameters())
    if learns or any(_is_watched(module) for module in (base, first, second)):
        return usual(x)
    out = _AtOnce.apply(
        x.reshape(-1, x.shape[-1]),
        base.weight.t() if isinstance(base, Conv1D) else base.weight,
        base.bias,
        first.weight,
        second.weight,
        layer.scaling[name],
        torch.get_autocast_dtype(device),
    )
    return out.unflatten(0, x.shape[:-1])


def _is_watched(module: Any) -> bool:
    """Whether something happens when the module is called, such as fetching its weights."""
    return bool(
        module._forward_pre_hooks  # noqa: SLF001
        or module._forward_hooks  # noqa: SLF001
        or module._backward_pre_hooks  # noqa: SLF001
        or module._backward_hooks  # noqa: SLF001
        or "forward" in vars(module)
    )


class _AtOnce(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T, with W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        first: Tensor,
        second: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x, weight, first = x.to(dtype), weight.to(dtype), first.to(dtype)
        second = (second * scaling).to(dtype)
        own = x @ weight.t() if bias is None else torch.addmm(bias.to(dtype), x, weight.t())
        low = x @ first.t()
        ctx.save_for_backward(x, weight, first, second, low)
        ctx.scaling = scaling
        return own.addmm_(low, second.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, first, second, low = ctx.saved_tensors
        grad_low = grad @ second
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, first)
        # The engine casts these to the type of what they are the gradients of.
        grad_second = (grad.t() @ low).float().mul_(ctx.scaling)
        return grad_x, None, None, grad_low.t() @ x, grad_second, None, None
