"""A frozen base in 16, 8 or 4 bits: how a model is read into it, and made plain again."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from suasion.core.errors import ConfigError, ModelError
from suasion.models.frozen import (
    FrozenLinear,
    Held,
    Workspace,
    as_conv1d,
    library,
    plain_layer,
    quantised_layer,
    require_library,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of plain weights, by their names in a recipe."""


def is_quantised(held: str) -> bool:
    """Whether weights so held are codes that cannot train."""
    return held in ("int8", "nf4")


def check_held(held: str, *, adapters: bool, where: str) -> None:
    """Refuse a frozen base without anything on it that trains.

    Args:
        held: How the base is to be held.
        adapters: Whether there will be adapters.
        where: Names the stage in the message.

    Raises:
        ConfigError: there will be none.
    """
    if held != "fp32" and not adapters:
        raise ConfigError(
            f"{where}.lora.base is {held}, but {where}.lora.r is 0: a frozen base with nothing to "
            "train",
            f"set {where}.lora.r to 8 or 16, or leave lora.base out to train all weights",
        )


def loading_options(held: str, rest: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of transformers' `from_pretrained` that bring the weights in as they will be held.

    Each tensor is quantised as it is read: the whole model is never in memory in full precision.

    Args:
        held: How the linear layers are held.
        rest: Type of all that is not quantised: embeddings, norms, heads.
        device: Where the model will be.

    Raises:
        ConfigError: bitsandbytes is not installed, or does not know the device.
    """
    if not is_quantised(held):
        return {"dtype": torch.bfloat16 if held == "bf16" else rest}
    require_library(held, device)
    from transformers import BitsAndBytesConfig

    asked = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if held == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    return {"dtype": rest, "quantization_config": asked, "device_map": {"": str(device)}}


def settle(model: Any, held: str) -> Any:
    """Freeze what `from_pretrained` brought in, with our layers in place of the library's.

    Raises:
        ModelError: the folder is quantised already and `held` is something else, or the model has
            no layer that could be quantised.
    """
    theirs = _library_layers(model) if hasattr(model, "hf_quantizer") else []
    if not is_quantised(held):
        if theirs:
            raise ModelError(
                f"{model.name_or_path}: {len(theirs)} of its layers are quantised already",
                "set lora.base to int8 or nf4, as they are; or take the model they were made from",
            )
        return model
    for name, layer in theirs:
        adopted = _adopted(layer)
        if adopted.held != held:
            raise ModelError(
                f"{model.name_or_path} is quantised already, in {adopted.held}, not {held}",
                f"set lora.base to {adopted.held}, or take the model it was made from",
            )
        model.set_submodule(name, adopted)
    _forget_library(model)
    return hold(model, held)


@torch.no_grad()
def hold(model: Any, held: str) -> Any:
    """Freeze a model and quantise its linear layers in place, one after the other.

    Heads stay as they are: the output head, whose errors would be errors of log-probabilities, and
    scalar heads, which train.

    Args:
        model: A causal LM or a classifier.
        held: "int8" or "nf4"; anything else only freezes.

    Raises:
        ModelError: it has no linear layer besides its heads.
    """
    model.requires_grad_(False)  # noqa: FBT003
    if not is_quantised(held):
        return model
    for name, layer in plain_layers(model):
        model.set_submodule(name, quantised_layer(layer, held))
    found = quantised_layers(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that {held} could hold",
            "hold its base in fp32 or bf16",
        )
    workspace = Workspace()
    for _, quantised in found:
        quantised.workspace = workspace
    return model


@torch.no_grad()
def hold_rounded(model: Any, dtype: torch.dtype, *, besides: Container[int] = ()) -> None:
    """Hold the linear layers of a model that never trains as autocast would round them each time.

    It computes the same under autocast, bit for bit, in half the memory, and no more without.

    Args:
        model: A causal LM or a classifier.
        dtype: Autocast's.
        besides: Ids of parameters that stay, since other models have them too.
    """
    for _, layer in plain_layers(model):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.dtype is torch.float32 and id(parameter) not in besides:
                setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def plain_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Linear layers, GPT-2's transposed ones too, that are neither quantised nor heads; by name."""
    heads = {id(model.get_output_embeddings())}
    heads |= {id(getattr(model, name, None)) for name in ("score", "classifier")}
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and id(module) not in heads
    ]


def quantised_layers(model: Any) -> list[tuple[str, FrozenLinear]]:
    """Layers held in 8 or 4 bits, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, FrozenLinear)]


def held_as(model: Any) -> Held:
    """How a model's frozen weights are held."""
    for _, layer in quantised_layers(model):
        return layer.held
    trunk = (p for _, p in _base_weights(model))
    return "bf16" if any(p.dtype is torch.bfloat16 for p in trunk) else "fp32"


@torch.no_grad()
def densify(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Turn a model without adapters back into plain layers, in place; it computes the same.

    Args:
        model: A causal LM or a classifier.
        dtype: Of every weight afterwards.
    """
    for name, layer in quantised_layers(model):
        plain = plain_layer(layer, dtype)
        model.set_submodule(name, as_conv1d(plain) if layer.transposed else plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _base_weights(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.dim() > 1 and not p.requires_grad)


def _library_layers(model: Any) -> list[tuple[str, Any]]:
    names = ("Linear8bitLt", "Linear4bit")
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ in names]


def _adopted(layer: Any) -> FrozenLinear:
    """The library's layer as one of ours, over the same codes."""
    transposed = getattr(layer, "source_cls", None) is Conv1D
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if type(layer).__name__ == "Linear8bitLt":
        scale = weight.SCB.float() / 127.0
        codes = weight.data
        return FrozenLinear(codes, scale, layer.bias, shape, "int8", transposed=transposed)
    state = weight.quant_state
    if state.quant_type != "nf4":
        raise ModelError(f"4-bit weights of type {state.quant_type}, and suasion knows nf4 alone")
    scale = state.absmax
    if state.nested:
        scale = library().functional.dequantize_blockwise(scale, state.state2) + state.offset
    return FrozenLinear(
        weight.data,
        scale.float(),
        layer.bias,
        shape,
        "nf4",
        block=state.blocksize,
        transposed=transposed,
    )


def _forget_library(model: Any) -> None:
    """Nothing of the library's is left, so nothing may say that there is."""
    for name in (
        "hf_quantizer",
        "is_quantized",
        "quantization_method",
        "is_loaded_in_8bit",
        "is_loaded_in_4bit",
        "is_8bit_serializable",
        "is_4bit_serializable",
    ):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
