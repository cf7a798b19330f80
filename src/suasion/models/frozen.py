"""Layers whose weights are codes of 8 or 4 bits: what they compute.

bitsandbytes quantises; the layers are our own, because its layers compute one function in training
and another in evaluation. In 8 bits on a processor, that shifts log-probabilities by 0.005 to
0.008, so that PPO's first ratios are not 1. In 4 bits, a processor with AVX512_BF16 repacks the
weights in the first evaluation, and training afterwards has no gradient, or fails. `FrozenLinear`
multiplies with the dequantised weights, always: one function, exact gradients, no activation kept
for the backward pass, and a merge that can reproduce it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from suasion.core.errors import ConfigError
from suasion.functional.autocast import product_dtype

Held = Literal["fp32", "bf16", "int8", "nf4"]
"""How the weights of a frozen base are held."""
AT_ONCE = 1 << 22
"""Weights that are quantised to 8 bits at the same time."""
NF4_BLOCK = 64
"""Weights that share one scale in 4 bits (arXiv 2305.14314, section 3)."""


class Workspace:
    """Memory in which the layers of a model unpack their weights, one after the other.

    On a processor, fresh memory for each weight costs several times what unpacking it does. What
    is in it lasts until the next layer.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def unpacked(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes as numbers of another type."""
        if codes.device.type != "cpu":  # other allocators keep memory ready themselves
            return codes.to(dtype)
        held = self._held.get(dtype)
        if held is None or held.numel() < codes.numel():
            held = self._held[dtype] = torch.empty(codes.numel(), dtype=dtype)
        return held[: codes.numel()].view(codes.shape).copy_(codes)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is held quantised and never trains.

    In 8 bits `weight` is int8, [out, in], and `scale` the largest magnitude of each row over 127,
    [out] (arXiv 2208.07339, section 2.1); in 4 bits `weight` packs two codes into each byte and
    `scale` is the largest magnitude of each block. It is an `nn.Linear`, so that peft puts adapters
    on it as on any other.

    Args:
        weight: Codes.
        scale: Scales, float32.
        bias: Of the layer it stands for, or None.
        shape: Outputs and inputs.
        held: "int8" or "nf4".
        block: Weights that share a scale, in 4 bits.
        transposed: The layer it stands for is GPT-2's, which holds its weight as [in, out].
    """

    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        held: Held,
        *,
        block: int = NF4_BLOCK,
        transposed: bool = False,
    ) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = shape
        self.held: Held = held
        self.block = block
        self.transposed = transposed
        self.workspace: Workspace | None = None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale, persistent=True)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Outputs [..., out] of inputs [..., in], in the precision of the inputs."""
        x = input.to(product_dtype(input.device, input.dtype))
        with torch.autocast(input.device.type, enabled=False):
            return _FrozenProduct.apply(x, self)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that this layer multiplies with, [out, in]."""
        if self.held == "int8":
            return self.weight.float().mul_(self.scale[:, None]).to(dtype)
        return self._decoded(dtype)

    def times(self, x: Tensor) -> Tensor:
        """Outputs without recording them for a backward pass."""
        if self.held == "nf4":
            y = nn.functional.linear(x, self._decoded(x.dtype))
        else:
            # The codes are whole numbers up to 127, exact in bf16 too; their scales wait.
            y = nn.functional.linear(x, self._unpacked(x.dtype)).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def times_transposed(self, gradient: Tensor) -> Tensor:
        """What of a gradient [..., out] reaches the inputs, [..., in]."""
        if self.held == "nf4":
            return gradient @ self._decoded(gradient.dtype)
        return (gradient * self.scale).to(gradient.dtype) @ self._unpacked(gradient.dtype)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        codes = self.weight.detach()
        return codes.to(dtype) if self.workspace is None else self.workspace.unpacked(codes, dtype)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        functional = library().functional
        state = functional.QuantState(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=dtype,
            blocksize=self.block,
            quant_type="nf4",
        )
        return functional.dequantize_4bit(self.weight.data, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        """Move, but never round: `model.to(dtype)` would change every weight by its scale."""
        exact = self.scale
        super()._apply(fn, recurse)
        self.scale = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.in_features}, {self.out_features}, {self.held}"


class _FrozenProduct(torch.autograd.Function):
    """A product with a constant; it keeps no activation, since only the inputs get gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.times_transposed(gradient), None


class WideHead(nn.Linear):
    """A scalar head in fp32 on a trunk in 16 bits: steps of 1e-5 vanish when bf16 rounds them."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Scores [..., labels] of hidden states [..., D]."""
        return super().forward(input.to(self.weight.dtype))

    @classmethod
    def on(cls, model: Any, head: nn.Linear) -> WideHead:
        """Put one in the place of `head`, over the same weights."""
        name = next(name for name, module in model.named_children() if module is head)
        wide = cls(head.in_features, head.out_features, bias=head.bias is not None)
        wide.load_state_dict(head.state_dict())
        setattr(model, name, wide.to(head.weight.device))
        return wide


@torch.no_grad()
def plain_layer(layer: Any, dtype: torch.dtype) -> Any:
    """A layer in `dtype`; of a quantised one an `nn.Linear` with the weights it multiplies with."""
    if not isinstance(layer, FrozenLinear):
        return layer.to(dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.dense(dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)


def as_conv1d(layer: nn.Linear) -> Any:
    """The layer as GPT-2 holds it, its weight transposed."""
    with torch.device("meta"):
        turned = Conv1D(layer.out_features, layer.in_features)
    turned.weight = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False)
    turned.bias = layer.bias
    return turned.train(layer.training)


def quantised_layer(layer: Any, held: str) -> FrozenLinear:
    """The same layer in codes; GPT-2's kind too."""
    transposed = isinstance(layer, Conv1D)
    weight = layer.weight.detach()
    weight = weight.T.contiguous() if transposed else weight.contiguous()
    codes, scale = quantise(weight, held)
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    kind: Held = "int8" if held == "int8" else "nf4"
    return FrozenLinear(codes, scale, layer.bias, shape, kind, transposed=transposed)


def quantise(weight: Tensor, held: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [out, in].

    Raises:
        ConfigError: bitsandbytes is not installed, or does not know the device.
    """
    require_library(held, weight.device)
    functional = library().functional
    if held == "int8":
        # Some rows at a time: on the way the library needs several times what comes out.
        parts = [
            functional.int8_vectorwise_quant(rows.to(torch.float16))
            for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))
        ]
        scales = torch.cat([largest for _, largest, _ in parts]).float() / 127.0
        return torch.cat([codes for codes, _, _ in parts]), scales
    codes, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, state.absmax


def require_library(held: str, device: torch.device) -> None:
    """Refuse what this environment or this device cannot quantise.

    Raises:
        ConfigError: bitsandbytes is not installed, or does not know the device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"lora.base is {held}, which needs bitsandbytes, and that is not installed",
            "pip install 'suasion[quant]', or set lora.base to bf16",
        )
    known = library().supported_torch_devices
    if device.type not in known:
        raise ConfigError(
            f"lora.base is {held}, which bitsandbytes cannot do on {device.type}",
            f"it knows {', '.join(sorted(known))}; or set lora.base to bf16",
        )


@cache
def library() -> Any:
    """Bitsandbytes, imported when it is first needed."""
    import bitsandbytes

    return bitsandbytes
