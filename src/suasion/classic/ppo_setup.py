"""What the classic trainer is handed, checked, and what it makes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from suasion.classic.errors import ArgumentError
from suasion.classic.kl_control import AdaptiveKLController, FixedKLController
from suasion.classic.ppo_config import PPOConfig
from suasion.classic.value_head import AutoModelForCausalLMWithValueHead


def check_parts(
    config: Any, model: Any, tokenizer: Any, lr_scheduler: Any
) -> tuple[PPOConfig, AutoModelForCausalLMWithValueHead, PreTrainedTokenizerBase]:
    """Refuse arguments of another type, and a configuration spoilt since it was made.

    Raises:
        ArgumentError: names the argument and what it is instead.
    """
    if not isinstance(config, PPOConfig):
        raise ArgumentError(f"config is a {type(config).__name__}, not a PPOConfig")
    config.check()
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise ArgumentError(
            f"model is a {type(model).__name__}, not an AutoModelForCausalLMWithValueHead",
            "wrap it: AutoModelForCausalLMWithValueHead.from_pretrained(model)",
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ArgumentError(f"tokenizer is a {type(tokenizer).__name__}, not a tokenizer")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ArgumentError(
            "the tokenizer has neither a padding nor an EOS token to fill batches with",
            "set tokenizer.pad_token",
        )
    if lr_scheduler is not None and not hasattr(lr_scheduler, "step"):
        raise ArgumentError(
            f"lr_scheduler is a {type(lr_scheduler).__name__}, not a torch learning-rate schedule"
        )
    return config, model, tokenizer


def adam(model: torch.nn.Module, config: PPOConfig) -> torch.optim.Optimizer:
    """The optimizer of those who do not bring one."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(learning, lr=config.learning_rate)


def check_optimizer(optimizer: Any, model: torch.nn.Module) -> None:
    """Refuse an optimizer that would not train this model.

    Raises:
        ArgumentError: it is no torch optimizer, or holds none of the model's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer is a {type(optimizer).__name__}, not a torch optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters() if p.requires_grad):
        raise ArgumentError(
            "the optimizer holds no parameter of the model",
            "build it from model.parameters() of the model given to the trainer, after adapters",
        )


def controller_of(config: PPOConfig) -> AdaptiveKLController | FixedKLController:
    """The KL controller a configuration asks for."""
    if config.adap_kl_ctrl:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


def batches_of(
    dataset: Dataset[Any] | datasets.Dataset,
    collate: Callable[[list[Any]], Any] | None,
    config: PPOConfig,
    known: set[str],
) -> DataLoader[Any]:
    """Shuffled batches of queries; the last, incomplete one is left out.

    Args:
        dataset: Rows.
        collate: Rows to a batch.
        config: Says how large a batch is and whether unused columns go.
        known: Columns that stay.

    Raises:
        ArgumentError: there are fewer rows than one batch.
    """
    if isinstance(dataset, datasets.Dataset) and config.remove_unused_columns:
        dataset = dataset.remove_columns(sorted(set(dataset.column_names) - known))
    if hasattr(dataset, "__len__") and len(dataset) < config.batch_size:
        raise ArgumentError(
            f"the dataset has {len(dataset)} rows, less than one batch of {config.batch_size}",
            "lower PPOConfig.batch_size or give more queries",
        )
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        collate_fn=collate,
        shuffle=True,
        drop_last=True,
    )


class NoSchedule:
    """A learning rate that stays."""

    def step(self) -> None:
        """Do nothing."""
