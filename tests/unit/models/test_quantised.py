"""Frozen bases in 8 and 4 bits: one function in every mode, exact gradients, and back again."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from suasion.config.schema import LoraConfig
from suasion.core.errors import ConfigError, ModelError
from suasion.core.records import token_batch
from suasion.models import frozen
from suasion.models.adapters import add_lora, base_record, check_base, merged
from suasion.models.frozen import FrozenLinear, WideHead
from suasion.models.load import load_causal_lm, new_reward_model, switch_off_dropout
from suasion.models.quantised import (
    check_held,
    densify,
    held_as,
    hold,
    hold_rounded,
    plain_layers,
    quantised_layers,
)
from suasion.models.references import AdapterOffReference
from suasion.models.roles import Policy
from suasion.rollout.sampler import sample
from suasion.trainers.ppo import uniform_rows
from tests.unit.conftest import FAMILIES, SHAPES, tiny_model

HELD = ("int8", "nf4")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = token_batch([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 1]], 0)
LORA = LoraConfig(r=4, dropout=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved tiny model of each family, written once."""
    root = tmp_path_factory.mktemp("bases")

    def of(family: str) -> Path:
        if not (root / family).is_dir():
            tiny_model(family).save_pretrained(root / family)
        return root / family

    return of


def held(family: str, how: str, **options: Any) -> Any:
    """A tiny model with its dropout off, so held."""
    model = hold(tiny_model(family, **options), how)
    switch_off_dropout(model)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What it says to one text."""
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    """What must hold whatever the architecture."""

    def test_all_but_heads_are_quantised(self, family: str, how: str) -> None:
        """GPT-2's transposed layers too, which other libraries leave as they are."""
        given = tiny_model(family)
        expected = [name for name, _ in plain_layers(given)]
        model = hold(given, how)
        assert [name for name, _ in quantised_layers(model)] == expected
        assert len(expected) >= 8
        assert not plain_layers(model)
        assert not isinstance(model.get_output_embeddings(), FrozenLinear)
        assert held_as(model) == how
        assert not any(p.requires_grad for p in model.parameters())

    def test_read_from_a_folder_it_is_the_same(
        self, folder: Callable[[str], Path], family: str, how: str
    ) -> None:
        """Quantised tensor by tensor while reading, or all at once afterwards."""
        read = load_causal_lm(str(folder(family)), held=how)
        made = hold(load_causal_lm(str(folder(family))), how)
        assert torch.equal(logits(read.eval()), logits(made.eval()))
        assert not hasattr(read, "hf_quantizer")
        assert not hasattr(read.config, "quantization_config")

    def test_training_and_evaluation_are_one_function(self, family: str, how: str) -> None:
        """The library's own layers are two."""
        model = held(family, how)
        assert torch.equal(logits(model.train()), logits(model.eval()))

    def test_dense_again_it_computes_the_same(self, family: str, how: str) -> None:
        """And is what it was: GPT-2's layers are transposed once more."""
        model = held(family, how)
        before = logits(model)
        plain = densify(model)
        assert torch.allclose(logits(plain), before, atol=5e-6)
        kinds = {name: type(layer) for name, layer in plain_layers(tiny_model(family))}
        assert {name: type(layer) for name, layer in plain_layers(plain)} == kinds

    def test_the_reference_is_the_base(self, family: str, how: str) -> None:
        """With its adapters off it gives the very log-probabilities of the base alone."""
        alone = Policy(held(family, how), 1.0).logprobs(BATCH)[0]
        model = add_lora(held(family, how), LORA)
        shake(model)
        policy = Policy(model.eval(), 1.0)
        assert not torch.allclose(policy.logprobs(BATCH)[0], alone, atol=1e-3)
        assert torch.equal(AdapterOffReference(policy).logprobs(BATCH), alone)

    def test_merging_keeps_what_was_learnt(self, family: str, how: str) -> None:
        """Dequantised, then merged."""
        model = add_lora(held(family, how), LORA)
        shake(model)
        before = logits(model.eval())
        assert torch.allclose(logits(merged(model)), before, atol=2e-5)


def shake(model: Any) -> None:
    """Give an adapter weights as if it had learnt something."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)


@pytest.mark.parametrize("how", HELD)
def test_gradients_are_those_of_the_dense_layer(how: str) -> None:
    """An ordinary layer with the dequantised weights has the same outputs and gradients."""
    torch.manual_seed(0)
    layer = frozen.quantised_layer(nn.Linear(64, 48), how)
    dense = frozen.plain_layer(layer, torch.float32)
    x = torch.randn(3, 5, 64)
    outer = torch.randn(3, 5, 48)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    y, z = layer(found), dense(expected)
    (y * outer).sum().backward()
    (z * outer).sum().backward()
    assert torch.allclose(y, z, atol=1e-5)
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, atol=1e-5)


def test_eight_bits_round_to_half_a_step() -> None:
    """A step is the row's largest magnitude over 127; fp16 comes in between."""
    weight = torch.randn(40, 64) * torch.logspace(-3, 0, 40)[:, None]
    codes, scale = frozen.quantise(weight, "int8")
    assert codes.dtype is torch.int8
    error = (codes.float() * scale[:, None] - weight).abs()
    assert bool((error <= 0.5 * scale[:, None] + 1e-3 * weight.abs()).all())
    assert torch.allclose(scale, weight.abs().amax(1) / 127, rtol=1e-3)


def test_four_bits_are_far_coarser() -> None:
    """Within a sixth of each block's largest magnitude (the widest gap of NF4, halved)."""
    weight = torch.randn(16, 64)
    layer = frozen.quantised_layer(nn.Linear(64, 16, bias=False), "nf4")
    codes, scale = frozen.quantise(weight, "nf4")
    layer.weight.data, layer.scale = codes, scale
    error = (layer.dense(torch.float32) - weight).abs().reshape(-1, 64)
    largest = weight.abs().reshape(-1, 64).amax(1, keepdim=True)
    assert bool((error <= 0.16 * largest).all())
    assert float(error.max()) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_once_it_computes_the_same(family: str) -> None:
    """What autocast rounds in every pass may be held rounded: bit for bit the same results."""
    model = tiny_model(family).requires_grad_(requires_grad=False)
    policy = Policy(model, 0.7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = policy.logprobs(BATCH)[0]
        layers = plain_layers(model)
        kept = {id(layers[0][1].weight)}
        hold_rounded(model, torch.bfloat16, besides=kept)
        after = policy.logprobs(BATCH)[0]
    assert torch.equal(before, after)
    assert layers[0][1].weight.dtype is torch.float32
    assert all(layer.weight.dtype is torch.bfloat16 for _, layer in layers[1:])
    assert model.get_output_embeddings().weight.dtype is torch.float32


def test_arithmetic_follows_the_inputs() -> None:
    """In bf16, under autocast too; scales stay in fp32 whatever the model is turned into."""
    layer = frozen.quantised_layer(nn.Linear(64, 48), "int8")
    x = torch.randn(2, 64)
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    exact = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.scale, exact)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))


def alternate(model: Any, steps: int = 20) -> tuple[list[float], list[float]]:
    """Generate, then train, again and again: losses, and the smallest gradient of any adapter."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses, norms = [], []
    for _ in range(steps):
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        second = [p for name, p in model.named_parameters() if "lora_B" in name]
        norms.append(min(0.0 if p.grad is None else float(p.grad.norm()) for p in second))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_after_generating(family: str, how: str) -> None:
    """Every adapter has its gradient, and the loss falls."""
    losses, norms = alternate(add_lora(held(family, how), LORA))
    assert min(norms) > 0
    assert losses[-1] < losses[0] - 0.2


def test_the_trap_in_four_bits_is_real(tmp_path: Path) -> None:
    """The library's own layers lose the gradient after an evaluation, where the CPU repacks them.

    Should this fail, the library has mended it (bitsandbytes 0.50.2 had not).
    """
    wide = {**SHAPES["llama"], "hidden_size": 64, "intermediate_size": 128}  # whole blocks
    config = AutoConfig.for_model("llama", vocab_size=300, **wide)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=asked, device_map={"": "cpu"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, norms = alternate(add_lora(theirs, LORA), steps=1)
    repacks = bool(bitsandbytes.nn.modules.has_avx512bf16())
    assert (norms[0] == 0) == repacks


def test_the_trap_in_eight_bits_is_real(folder: Callable[[str], Path]) -> None:
    """The library's own layers are two functions; see `TestEveryFamily` for ours."""
    asked = BitsAndBytesConfig(load_in_8bit=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        folder("llama"), quantization_config=asked, device_map={"": "cpu"}
    )
    apart = (logits(theirs.train()) - logits(theirs.eval())).abs().max()
    assert apart > 1e-3


@pytest.mark.parametrize("how", HELD)
def test_the_first_ratio_is_one(how: str) -> None:
    """Log-probabilities of the rollout, from a cache, and of the update, in either mode."""
    model = add_lora(held("llama", how), LORA)
    shake(model)
    policy = Policy(model.eval(), 1.0)
    queries, limits = [[5, 6, 7], [8, 9]], [6, 6]
    rollout = sample(
        policy, queries, limits, uniform_rows(1, ("rollout",), limits), stop_ids=(1,), pad_id=0
    )
    batch = token_batch(rollout.queries, rollout.responses, 0)
    sampled = torch.cat(list(rollout.logprobs))
    with torch.no_grad():
        evaluated = policy.logprobs(batch)[0]
    trained = Policy(model.train(), 1.0).logprobs(batch)[0].detach()
    assert torch.equal(trained, evaluated)
    assert torch.allclose(sampled, evaluated, atol=2e-5)


def test_nothing_is_said_per_product(caplog: pytest.LogCaptureFixture) -> None:
    """The library's int8 product warns at each call that it casts its inputs."""
    model = add_lora(held("llama", "int8"), LORA)
    with caplog.at_level(logging.DEBUG):
        alternate(model, steps=2)
    assert not [row for row in caplog.records if row.name.startswith("bitsandbytes")]


@pytest.mark.parametrize("how", ["fp32", *HELD])
def test_activations_computed_again_change_no_gradient(how: str) -> None:
    """In evaluation mode too, where transformers' own switch does nothing."""
    gradients = []
    for checkpointing in (False, True):
        config = LoraConfig(r=4, dropout=0.0, checkpointing=checkpointing)
        model = add_lora(held("llama", how), config).eval()
        shake(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 28
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("how", ["bf16", *HELD])
def test_scores_are_in_full_precision(folder: Callable[[str], Path], how: str) -> None:
    """On a trunk in bf16 a head of its own type would not move by small steps."""
    model: Any = new_reward_model(str(folder("llama")), 0, torch.bfloat16, seed=1, held=how)
    model = add_lora(model, LORA, head=True)
    head = model.get_base_model().score.modules_to_save["default"]
    assert isinstance(head, WideHead)
    assert head.weight.dtype is torch.float32
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD([head.weight], lr=1e-7)
    model(input_ids=IDS).logits.sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    assert torch.equal(head.weight.bfloat16(), before.bfloat16())


def test_the_folder_tells_what_the_adapter_lies_on(tmp_path: Path) -> None:
    """How the base was held, and which weights it had."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    model = add_lora(load_causal_lm(str(base), held="int8"), LORA)
    record = base_record(model)
    assert record["held"] == "int8"
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    (adapter / "suasion.json").write_text(json.dumps({"template": "t", "base": record}))
    assert check_base(adapter, str(base)) == "int8"
    tiny_model("llama", seed=9).save_pretrained(base)
    with pytest.raises(ModelError, match="was trained on other weights"):
        check_base(adapter, str(base))


class TestRefusals:
    """What is said where it cannot be done."""

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message names the extra."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"pip install 'suasion\[quant\]'"):
            hold(tiny_model("llama"), "int8")

    def test_on_a_device_the_library_does_not_know(
        self, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By name, with those it knows."""
        monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        with pytest.raises(ConfigError, match="cannot do on cpu"):
            load_causal_lm(str(folder("llama")), held="nf4")

    def test_without_adapters(self) -> None:
        """Codes do not train."""
        with pytest.raises(ConfigError, match=r"reward\.lora\.r is 0"):
            check_held("int8", adapters=False, where="reward")
        check_held("fp32", adapters=False, where="reward")
        check_held("nf4", adapters=True, where="reward")

    def test_nothing_to_quantise(self) -> None:
        """A base of which nothing would be held in fewer bits."""

        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.score = nn.Linear(4, 1)

            def get_output_embeddings(self) -> None:
                return None

        with pytest.raises(ModelError, match="no linear layer that int8 could hold"):
            hold(Bare(), "int8")

    def test_a_folder_that_is_quantised_already(
        self, folder: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """It can be held as it is, and not otherwise."""
        asked = BitsAndBytesConfig(load_in_8bit=True)
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            folder("gpt2"), quantization_config=asked, device_map={"": "cpu"}
        )
        theirs.save_pretrained(tmp_path / "int8")
        with pytest.raises(ModelError, match="8 of its layers are quantised already"):
            load_causal_lm(str(tmp_path / "int8"))
        with pytest.raises(ModelError, match="in int8, not nf4"):
            load_causal_lm(str(tmp_path / "int8"), held="nf4")
        read = load_causal_lm(str(tmp_path / "int8"), held="int8").eval()
        made = hold(load_causal_lm(str(folder("gpt2"))), "int8").eval()
        assert torch.equal(logits(read), logits(made))
        assert isinstance(densify(read).transformer.h[0].attn.c_attn, Conv1D)
