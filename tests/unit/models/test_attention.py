"""Sequences side by side in one row: nothing of one reaches another, in any family that may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from suasion.models import attention
from suasion.models.attention import NAME, STEP, can_pack, run_packed, spare_tokens
from suasion.models.packing import one_by_one
from tests.unit.conftest import FAMILIES, tiny_model

PACKABLE = ("gpt2", "llama", "gpt_neox", "opt", "qwen2")
LENGTHS = (7, 13, 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_may(family: str, dtype: torch.dtype) -> None:
    """The others keep their own attention, and are padded."""
    model = tiny_model(family).to(dtype)
    before = model.config._attn_implementation  # noqa: SLF001
    assert can_pack(model, model.base_model) == (family in PACKABLE)
    after = model.config._attn_implementation  # noqa: SLF001
    assert after == (NAME if family in PACKABLE else before)


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_is_alone(family: str) -> None:
    """Hidden states and gradients, to float32's accuracy."""
    found = []
    for packed in (True, False):
        model = tiny_model(family)
        trunk = model.base_model
        assert can_pack(model, trunk)
        ids = torch.arange(2, 2 + sum(LENGTHS))
        if packed:
            hidden = run_packed(trunk, ids, LENGTHS)
        else:
            parts = [trunk(input_ids=part[None], use_cache=False) for part in ids.split(LENGTHS)]
            hidden = torch.cat([part.last_hidden_state[0] for part in parts])
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        (hidden * weights).sum().backward()
        grads = [p.grad for p in trunk.parameters() if p.grad is not None]
        found.append([hidden.detach(), *grads])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", PACKABLE)
def test_everything_else_is_the_librarys(family: str) -> None:
    """Padded batches and generation do not notice the attention's new name."""
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found: list[list[Tensor]] = []
    for ours in (True, False):
        model = tiny_model(family)
        if ours:
            assert can_pack(model, model.base_model)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        found.append([out.logits[mask.bool()], text])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_noticed(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """Sequences that see each other are not what they are alone."""

    def as_one(*inputs: Any) -> Tensor:
        *qkv, lengths, scale = inputs
        return one_by_one(*qkv, [sum(lengths)], scale)

    monkeypatch.setattr(attention, "one_by_one", as_one)
    model = tiny_model(family).to(dtype)
    assert not can_pack(model, model.base_model)


def test_sliding_windows_are_refused() -> None:
    """They look at part of the past only, which a short trial would not show."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    config = MistralConfig(**small, num_attention_heads=2, num_key_value_heads=1, sliding_window=64)
    model = AutoModelForCausalLM.from_config(config)
    assert not can_pack(model, model.base_model)
    open_config = AutoConfig.for_model(
        "mistral", **small, num_attention_heads=2, num_key_value_heads=1, sliding_window=None
    )
    open_model = AutoModelForCausalLM.from_config(open_config)
    assert can_pack(open_model, open_model.base_model)


def test_rows_come_in_steps_where_kernels_are_built() -> None:
    """Under bf16 or another float32 back end; torch's own takes any number."""
    assert spare_tokens([STEP, 3]) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert spare_tokens([STEP, 3]) == [STEP - 3]
        assert spare_tokens([3 * STEP]) == []
        assert spare_tokens([STEP - 1]) == []
        assert spare_tokens([3500]) == [STEP, 3584 - 3500 - STEP]
        # The context may be as short as the longest sequence.
        assert spare_tokens([20] * 4) == [20, 20, 8]
