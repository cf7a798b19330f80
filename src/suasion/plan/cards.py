"""Where a run would happen: how much memory there is, and what computing there looks like."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from suasion.core.errors import ConfigError

GIB = 1 << 30
CONTEXT = 600_000_000
"""Bytes that a CUDA context with its libraries holds beside tensors; 0.4 to 0.8 GB by GPU."""
LIBRARIES = 620_000_000
"""Bytes that interpreter and libraries hold where there is no GPU, as benchmarks/memory/validate.py
measures it."""
UTILISATION = 0.35
"""Share of a GPU's peak that training is taken to reach, where nothing was measured."""

KNOWN: dict[str, tuple[float, float]] = {
    "t4": (16, 65e12),
    "v100-16": (16, 112e12),
    "v100-32": (32, 112e12),
    "rtx3060": (12, 51e12),
    "rtx3080": (10, 119e12),
    "rtx3090": (24, 71e12),
    "rtx4070": (12, 58e12),
    "rtx4080": (16, 97e12),
    "rtx4090": (24, 165e12),
    "rtx5090": (32, 210e12),
    "a10": (24, 125e12),
    "a40": (48, 150e12),
    "a6000": (48, 155e12),
    "l4": (24, 121e12),
    "l40s": (48, 362e12),
    "a100-40": (40, 312e12),
    "a100-80": (80, 312e12),
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "b200": (180, 2250e12),
}
"""GiB, and peak operations per second in 16 bits without sparsity, by their makers' data sheets."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GIB|G|MB|MIB|M|TB|TIB|T)", re.IGNORECASE)
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


@dataclass(frozen=True)
class Card:
    """Memory to fit into."""

    name: str
    """As the user named it."""
    memory: int
    """Bytes."""
    gpu: bool
    """Whether it is a GPU; else the memory of a computer without one."""
    process: int
    """Bytes of it that interpreter and libraries, or the CUDA context, hold."""
    flops: float | None = None
    """Operations per second to expect; None: measure."""

    def precision(self, asked: str) -> torch.dtype:
        """Type of the arithmetic, where `auto` is bf16 on a GPU."""
        if asked == "auto":
            return torch.bfloat16 if self.gpu else torch.float32
        return torch.bfloat16 if asked == "bf16" else torch.float32

    def rest_dtype(self, asked: str) -> torch.dtype:
        """Type of what is not quantised beside quantised layers."""
        return self.precision(asked)

    def autocast(self, asked: str) -> AbstractContextManager[Any]:
        """Context of a forward pass, on the processor whatever the card: sizes are the same."""
        dtype = self.precision(asked)
        return nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype=dtype)


def this_machine() -> Card:
    """The GPU if there is one, else the processor's memory, or what a container may use of it."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Card(about.name, int(about.total_memory), gpu=True, process=CONTEXT)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and path.read_text(encoding="ascii").strip().isdigit():
            memory = min(memory, int(path.read_text(encoding="ascii")))
    return Card("this machine", memory, gpu=False, process=LIBRARIES)


def named(name: str | None) -> Card:
    """A card by its name or its size; None: this machine.

    Args:
        name: "rtx3090", "a100-80", "24GB", "24GiB".

    Raises:
        ConfigError: there is no such card, or the size makes no sense.
    """
    if name is None:
        return this_machine()
    plain = re.sub(r"[\s_]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
    if plain in KNOWN:
        gib, flops = KNOWN[plain]
        return Card(plain, int(gib * GIB), gpu=True, process=CONTEXT, flops=UTILISATION * flops)
    return Card(name, parse_size(name), gpu=True, process=CONTEXT)


def parse_size(text: str) -> int:
    """Bytes of "24GB" (10^9) or "24GiB" (2^30).

    Raises:
        ConfigError: it is neither a size nor a known card.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        plain = text.strip().lower()
        close = difflib.get_close_matches(plain, KNOWN, n=1) or [k for k in KNOWN if plain in k]
        hint = "".join(f"did you mean {name}? " for name in close[:1])
        raise ConfigError(
            f"--card {text}: no card of that name, and no size such as 24GB or 24GiB",
            f"{hint}known: {', '.join(KNOWN)}",
        )
    number, unit = float(found[1]), found[2].upper().removesuffix("B")
    size = int(number * _UNITS[unit])
    if size < _UNITS["M"]:
        raise ConfigError(f"--card {text}: a card has more than a megabyte", "write 24GB or so")
    return size
