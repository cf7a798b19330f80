"""Packed blocks as a dataset for the Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from suasion.core.errors import ConfigError


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
        """A batch whose labels are its inputs; the model shifts them."""
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids, "use_cache": False}


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
