"""One seed, named streams.

Every consumer of randomness asks for a stream by name, so that adding one never shifts another:
`seed_of(1, "rollout", 7)` is the same number whoever else draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` under `seed`."""
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream `names` under `seed`."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, *names))
