"""The order of training rows: batches of similar length, so that little is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from suasion.core.seeding import generator

POOL = 32
"""Batches whose rows are sorted together: enough to match lengths, few enough to stay random."""


def length_grouped(lengths: Sequence[int], passes: float, batch: int, seed: int) -> list[int]:
    """Row indices for `passes` times over the data, each batch of similar lengths.

    Rows are shuffled, sorted by length within pools of `POOL` batches, cut into batches, and the
    batches shuffled; each pass anew. The whole order is a function of its arguments, so a resumed
    run only has to skip what it has seen.

    Args:
        lengths: Tokens of each row.
        passes: Times over the data; a fraction ends within a pass.
        batch: Rows per batch.
        seed: Root seed.
    """
    total = max(1, round(len(lengths) * passes))
    order: list[int] = []
    epoch = 0
    while len(order) < total:
        draw = generator(seed, "order", epoch)
        rows = torch.randperm(len(lengths), generator=draw).tolist()
        pools = [rows[at : at + POOL * batch] for at in range(0, len(rows), POOL * batch)]
        grouped = [row for pool in pools for row in sorted(pool, key=lambda i: -lengths[i])]
        full = len(grouped) // batch
        places = torch.randperm(full, generator=draw).tolist()
        for place in places:
            order += grouped[place * batch : (place + 1) * batch]
        order += grouped[full * batch :]
        epoch += 1
    return order[:total]


class Ordered(Dataset[Any]):
    """A dataset read in a given order.

    Args:
        dataset: Where rows come from.
        order: Indices into it; any number of times each.
    """

    def __init__(self, dataset: Any, order: Sequence[int]) -> None:
        self._dataset = dataset
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._order[index]]
