"""Packed blocks as a dataset for the Trainer, and the language-modelling loss on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from suasion.core.errors import ConfigError
from suasion.core.records import TokenBatch
from suasion.models.roles import Policy


class Blocks(Dataset[torch.Tensor]):
    """Blocks of token ids, [count, block]."""

    def __init__(self, blocks: NDArray[np.int32]) -> None:
        self._blocks = torch.from_numpy(blocks.astype(np.int64))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._blocks[index]

    @staticmethod
    def collate(rows: list[torch.Tensor]) -> dict[str, Any]:
        """One batch, [B, block]."""
        return {"input_ids": torch.stack(rows)}


def causal_lm_loss(policy: Policy, batch: dict[str, Any]) -> torch.Tensor:
    """Mean negative log-likelihood of every token of a block but the first, nats.

    The same chunked log-probabilities as in the policy's update: no logits of all positions.
    """
    ids = batch["input_ids"]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    predicts = everywhere.clone()
    predicts[:, -1] = False
    return -policy.logprobs(TokenBatch(ids, everywhere, predicts))[0].mean()


def check_block(block: int, context: int) -> None:
    """Refuse blocks that the positions of the model do not reach.

    Raises:
        ConfigError: the block is longer than the context.
    """
    if block > context:
        raise ConfigError(
            f"block {block} is longer than the model's context of {context} tokens",
            f"set block to {context} or less",
        )
