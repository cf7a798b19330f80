"""Models of any size that are shapes only, built from a configuration as training would build them.

They are built on the meta device by the library's own constructors, get their adapters and their
quantised layers there, and are then given empty tensors on the processor, so that the code that
runs them takes the paths it takes on a processor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from suasion.config.schema import LoraConfig
from suasion.core.errors import ModelError
from suasion.models.adapters import add_lora
from suasion.models.frozen import NF4_BLOCK, FrozenLinear, WideHead, Workspace
from suasion.models.load import score_head, switch_off_dropout, with_fused_activations
from suasion.models.quantised import (
    is_quantised,
    plain_layers,
)


def hollow_model(
    config: PretrainedConfig,
    *,
    scores: bool = False,
    held: str = "fp32",
    rest: torch.dtype = torch.float32,
    lora: LoraConfig | None = None,
    dropout: bool = True,
    own_dropout: bool = True,
    more: tuple[tuple[str, int], ...] = (),
) -> Any:
    """A model on the meta device, with the types, layers and adapters that training would give it.

    Args:
        config: The architecture.
        scores: A sequence classifier with one score instead of a causal language model.
        held: How the linear layers of a frozen base are held.
        rest: Type of what is not quantised, where some of it is.
        lora: Adapters, where the rank is above 0.
        dropout: Leave the adapter's dropout on.
        own_dropout: Leave the model's own dropout on.
        more: Names and ranks of further adapters on the same modules.

    Raises:
        ModelError: transformers has no such model of this family.
    """
    config = copy.deepcopy(config)
    kind: Any = AutoModelForCausalLM
    if scores:
        kind = AutoModelForSequenceClassification
        config.num_labels = 1
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(held, rest)
    with torch.device("meta"):
        try:
            model = kind.from_config(config, dtype=dtype)
        except ValueError as error:
            what = "classifier" if scores else "causal language model"
            raise ModelError(
                f"transformers has no {what} of the family {config.model_type}"
            ) from error
        with_fused_activations(model)
        if scores and dtype is not torch.float32:
            WideHead.on(model, score_head(model))
        if held != "fp32":
            model.requires_grad_(False)  # noqa: FBT003
        if is_quantised(held):
            workspace = Workspace()
            for name, layer in plain_layers(model):
                codes = _codes(layer, held)
                codes.workspace = workspace
                model.set_submodule(name, codes)
        if not own_dropout:
            switch_off_dropout(model)
        if lora is not None and lora.r:
            model = add_lora(model, lora, head=scores, dropout=dropout)
            for name, rank in more:
                model.add_adapter(name, replace(model.peft_config["default"], r=rank))
    return model


def _codes(layer: Any, held: str) -> FrozenLinear:
    """The quantised stand-in of a linear layer."""
    transposed = isinstance(layer, Conv1D)
    rows, columns = layer.weight.shape
    shape = (columns, rows) if transposed else (rows, columns)
    if held == "int8":
        weight, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
    else:
        count = rows * columns
        weight = torch.empty((-(-count // 2), 1), dtype=torch.uint8)
        scale = torch.empty(-(-count // NF4_BLOCK))
    kind: Any = held
    return FrozenLinear(weight, scale, layer.bias, shape, kind, transposed=transposed)


def furnish(model: Any) -> Any:
    """Give a model on the meta device empty tensors; to be called inside `without_contents`."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (new, tensor)  # the old one is kept, or its id would be reused
        return made[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = empty(tensor)
    return model


@contextmanager
def shallow(model: Any) -> Iterator[None]:
    """Within, a model has its first two layers only: enough to try what it can do, and fast."""
    depth = getattr(model.config, "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 2]
    whole = [stack._modules for stack in stacks]  # noqa: SLF001
    for stack, layers in zip(stacks, whole, strict=True):
        stack._modules = dict(list(layers.items())[:2])  # noqa: SLF001
    try:
        yield
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack._modules = layers  # noqa: SLF001


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


@dataclass(frozen=True)
class Held:
    """The weights of a model, counted."""

    weights: dict[str, int]
    """Bytes by how they are held: fp32, bf16, int8, nf4."""
    adapters: int
    """Bytes of low-rank weights."""
    parameters: int
    """Numbers that they stand for, adapters included."""


def held_by(model: nn.Module, own: Iterable[Tensor]) -> Held:
    """Count those tensors of a model that are among `own`."""
    wanted = {id(tensor) for tensor in own}
    codes = {id(m.weight): m for m in model.modules() if isinstance(m, FrozenLinear)}
    weights: dict[str, int] = {}
    adapters = parameters = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in wanted:
            continue
        size = tensor.numel() * tensor.element_size()
        layer = codes.get(id(tensor))
        if isinstance(tensor, nn.Parameter):
            parameters += layer.in_features * layer.out_features if layer else tensor.numel()
        if "lora_" in name:
            adapters += size
            continue
        kind = layer.held if layer else _NAMES.get(tensor.dtype, str(tensor.dtype)[6:])
        weights[kind] = weights.get(kind, 0) + size
    return Held(weights, adapters, parameters)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
