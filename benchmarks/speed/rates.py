"""What this machine can do: matrix products and memory traffic, measured in the same run.

python -m benchmarks.speed.rates [SIZE], prints one JSON object. Standard library and torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

SIZE = 2048
"""Rows and columns of the matrices."""
REPEATS = 5
MODES = {
    "fp32": ("highest", torch.float32),
    "fp32 fast": ("medium", torch.float32),
    "bf16": ("highest", torch.bfloat16),
}
"""torch's setting for float32 products, and the type of the operands."""


def best_seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Shortest of several calls, after one that is not timed: a rate is a ceiling."""
    function()
    spans = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        spans.append(time.perf_counter() - began)
    return min(spans)


def matmul_rate(precision: str, kind: torch.dtype, size: int) -> tuple[float, float]:
    """Operations per second of a square product, and its relative error against float64."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = left[:64].double() @ right.double()
    left, right = left.to(kind), right.to(kind)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        seconds = best_seconds(lambda: left @ right)
        error = ((left @ right)[:64].double() - exact).norm() / exact.norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / seconds, float(error)


def copy_rate(size: int) -> float:
    """Bytes per second of a copy, read and written bytes both counted."""
    source = torch.ones(16 * size * size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source))


def measure(size: int = SIZE) -> dict[str, float]:
    """Every rate, and the error of each way to multiply."""
    found = {"copy_bytes_per_second": copy_rate(size)}
    for name, (precision, kind) in MODES.items():
        rate, error = matmul_rate(precision, kind, size)
        found[f"{name} flops"] = rate
        found[f"{name} error"] = error
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
