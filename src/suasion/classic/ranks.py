"""Several processes, each with batches of its own, under any launcher that accelerate knows.

Gradients are summed by the trainer itself (`trainers.policy`), so the model needs no wrapper.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from suasion.classic.tools import set_seed


def same_on_every_rank(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Take the first process's weights: value heads and adapters begin at random."""
    if accelerator.num_processes > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.copy_(broadcast(tensor.data))


def seed_this_rank(accelerator: Accelerator, seed: int) -> None:
    """Give each process its own samples; the data loader agrees on its order by itself."""
    if accelerator.num_processes > 1:
        set_seed(seed + accelerator.process_index)


def average_over_ranks(accelerator: Accelerator, stats: dict[str, Any]) -> dict[str, Any]:
    """Mean of every number over the processes; arrays stay those of this process."""
    if accelerator.num_processes == 1:
        return stats
    names = [name for name, value in stats.items() if isinstance(value, float)]
    mine = torch.tensor([stats[name] for name in names], device=accelerator.device)
    mean = accelerator.reduce(mine, reduction="mean").tolist()
    return stats | dict(zip(names, mean, strict=True))


def gathered_rows(accelerator: Accelerator, rows: list[Any]) -> list[Any]:
    """The rows of all processes, in the order of the processes."""
    return list(gather_object(rows)) if accelerator.num_processes > 1 else rows
