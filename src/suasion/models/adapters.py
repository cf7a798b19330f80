"""LoRA adapters: put on, merged, and the merge proven."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model

from suasion.config.schema import LoraConfig
from suasion.core.errors import ConfigError


def add_lora(
    model: Any, config: LoraConfig, *, seed: int = 0, head: bool = False, dropout: bool = True
) -> Any:
    """Put a LoRA adapter on `model`; only the adapter (and a scoring head) then trains.

    Args:
        model: A causal LM, or a classifier if `head`.
        config: Rank and the rest; `targets` empty means every linear layer but the output head.
        seed: Draws the adapter's first weights.
        head: The model has a scoring head, which trains in full and is saved with the adapter.
        dropout: Use the configured dropout; the policy must not.

    Raises:
        ConfigError: no module has one of the names in `targets`.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(
                model,
                PeftLoraConfig(
                    r=config.r,
                    lora_alpha=config.alpha,  # type: ignore[arg-type]
                    lora_dropout=config.dropout if dropout else 0.0,
                    bias="none",
                    target_modules=list(config.targets) or "all-linear",
                    task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
                ),
            )
    except ValueError as error:
        raise ConfigError(
            f"lora.targets {list(config.targets)}: {str(error).splitlines()[0]}",
            "name modules of this model, or leave targets empty for all linear layers",
        ) from error
