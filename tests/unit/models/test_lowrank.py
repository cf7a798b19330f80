"""Layers with an adapter, computed as one function under autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from suasion.models import lowrank
from suasion.models.lowrank import adapters_at_once


class Small(nn.Module):
    """One layer, of the kind asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer: Any = {
            "linear": lambda: nn.Linear(12, 20),
            "no bias": lambda: nn.Linear(12, 20, bias=False),
            "conv1d": lambda: Conv1D(20, 12),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's."""
        out: Tensor = self.layer(x)
        return out


def adapted(kind: str = "linear", **options: Any) -> Any:
    """With an adapter that does something."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": kind == "conv1d", **options}
    model: Any = get_peft_model(Small(kind), LoraConfig(target_modules=["layer"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or parameter.dim() == 1:
                parameter.normal_(std=0.3)
    return model


def learnt(model: Any, *, at_once: bool, half: bool = True) -> dict[str, Tensor]:
    """Output and gradients, of the input too."""
    dtype = next(model.parameters()).dtype
    rng = torch.Generator().manual_seed(1)
    x, slope = (torch.randn(3, 7, n, generator=rng).to(dtype) for n in (12, 20))
    x.requires_grad_()
    with adapters_at_once(*[model] * at_once):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(x)
        (out.to(dtype) * slope).sum().backward()
    learns = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **learns}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each use of the function."""
    made: list[int] = []
    usual = lowrank._AtOnce.apply  # noqa: SLF001

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return usual(*arguments)

    monkeypatch.setattr(lowrank._AtOnce, "apply", counted)  # noqa: SLF001
    return made


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_as_exact_as_apart(calls: list[int], kind: str) -> None:
    """Output and every gradient, against float64; types and names as before."""
    exact = learnt(adapted(kind).double(), at_once=False, half=False)
    apart = learnt(adapted(kind), at_once=False)
    assert not calls
    found = learnt(adapted(kind), at_once=True)
    assert len(calls) == 1
    assert found.keys() == apart.keys() == exact.keys()
    for name, one in found.items():
        off, before = (float((x.double() - exact[name]).norm()) for x in (one, apart[name]))
        assert one.dtype is apart[name].dtype
        assert one.shape == apart[name].shape
        assert off <= 1.5 * before, name
        assert off <= 0.01 * float(exact[name].norm()), name


def test_the_adapter_of_the_moment(calls: list[int]) -> None:
    """Asked at every call: another one, or none."""
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(2, 12)
    with adapters_at_once(model), torch.autocast("cpu", dtype=torch.bfloat16):
        one = model(x)
        model.set_adapter("other")
        other = model(x)
        with model.disable_adapter():
            none = model(x)
    assert len(calls) == 2  # none has nothing to add
    for found, name in ((one, "default"), (other, "other")):
        model.set_adapter(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(found, model(x), atol=0.03, rtol=0.02)
    with model.disable_adapter(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(none, model(x))


def test_everything_else_is_pefts(calls: list[int]) -> None:
    """Equal bit by bit: float32, dropout, weights that learn, another kind of adapter."""
    unlike = {
        "float32": (adapted(), False),
        "dropout": (adapted(lora_dropout=0.5), True),
        "dora": (adapted(use_dora=True), True),
        "bias": (adapted(bias="lora_only"), True),
    }
    for name, (model, half) in unlike.items():
        found = []
        for at_once in (False, True):
            torch.manual_seed(7)
            found.append(learnt(copy.deepcopy(model), at_once=at_once, half=half))
        for key, one in found[0].items():
            assert torch.equal(one, found[1][key]), (name, key)
    assert not calls


def test_hooks_are_called(calls: list[int]) -> None:
    """What fetches a layer's weights when it is called (sharded ones) still does."""
    model, seen = adapted(), []
    base = model.base_model.model.layer.base_layer
    base.register_forward_pre_hook(lambda *_: seen.append(1))
    learnt(model, at_once=True)
    assert seen
    assert not calls


def test_layers_get_their_own_function_back() -> None:
    """After an error too, and where two models share them."""
    model = adapted()
    layer = model.base_model.model.layer
    with adapters_at_once(model, model.base_model):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(RuntimeError), adapters_at_once(model):
        model(torch.randn(2, 13))
    assert "forward" not in vars(layer)
