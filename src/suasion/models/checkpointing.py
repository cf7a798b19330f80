"""Activations that are computed again instead of kept, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from suasion.core.errors import ModelError


def checkpoint_layers(model: Any) -> Any:
    """Keep of each layer only what goes into it; the backward pass computes the rest once more.

    transformers' own switch works in training mode alone, and a policy is updated in evaluation
    mode; this one works wherever gradients are recorded and no cache is filled (arXiv 1604.06174).

    Args:
        model: With adapters or without; changed in place.

    Raises:
        ModelError: the family has no layers that can be run again.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers whose activations could be computed again",
            "leave lora.checkpointing off",
        )
    for layer in layers:
        if not isinstance(layer.forward, partial):  # a second call changes nothing
            layer.forward = partial(_again, layer.forward)
    return model


def _again(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled() or named.get("past_key_values") is not None:
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
