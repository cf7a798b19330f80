"""Adapters that would make no sense are refused before any memory is spent on them."""

from __future__ import annotations

import pytest

from suasion.config.schema import LoraConfig
from suasion.core.errors import ConfigError
from suasion.models.adapters import add_lora
from tests.unit.conftest import tiny_model


def test_a_rank_above_the_width() -> None:
    """The width itself is allowed."""
    width = tiny_model("gpt2").config.hidden_size
    add_lora(tiny_model("gpt2"), LoraConfig(r=width))
    with pytest.raises(ConfigError, match=rf"lora.r is {width + 1}, and the model is {width} wide"):
        add_lora(tiny_model("gpt2"), LoraConfig(r=width + 1))


def test_targets_that_the_model_lacks() -> None:
    """They are named."""
    with pytest.raises(ConfigError, match=r"lora\.targets.*q_prj"):
        add_lora(tiny_model("gpt2"), LoraConfig(r=2, targets=("q_prj",)))
