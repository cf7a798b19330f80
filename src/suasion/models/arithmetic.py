"""In which arithmetic a stage runs: what this device does fast, where that is measured to be safe.

Two things can be chosen. Matrix products may run in bf16 (under autocast: weights, gradients, sums
and softmax stay float32). And float32 products may run on another back end, which torch selects by
`set_float32_matmul_precision`: on some processors (AMD Zen 5) it is as exact and twice as fast, on
others (Intel with AMX) it rounds to bf16, so its error is measured before it is used.

A choice that hangs on a clock is made once for each stage, written beside its results and read from
there when the stage is resumed; models narrower than `NARROW` are not worth it and never depend on
one, so that runs on them are equal byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from suasion.core.files import read_json, write_json
from suasion.core.manifest import ARITHMETIC
from suasion.core.ranks import ALONE, Ranks
from suasion.models.load import dtype_for

NARROW = 256
"""Models of a smaller width spend their time elsewhere: always float32, torch's own back end."""
GAIN = 1.3
"""Times as fast as the alternative an arithmetic has to be, for it to be chosen."""
ROWS = {"training": 512, "decoding": 16}
"""Rows of the products that are timed: a micro-batch, and one token of a batch."""
SECONDS = 0.15
"""Longest time for one timing."""


@dataclass(frozen=True)
class Arithmetic:
    """What was chosen."""

    asked: str
    """The configuration's `precision`."""
    dtype: str = "float32"
    """Of matrix products, under autocast: "float32" or "bfloat16"."""
    training: str = "highest"
    """`set_float32_matmul_precision` for forward and backward passes."""
    decoding: str = "highest"
    """The same while responses are sampled."""
    measured: dict[str, float] = field(default_factory=dict)
    """GFLOP/s by phase and arithmetic, and relative errors against float64."""

    def autocast(self, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
        """Makes the context of each forward pass."""
        if self.dtype == "float32":
            return nullcontext
        return partial(torch.autocast, device.type, dtype=getattr(torch, self.dtype))

    @property
    def brief(self) -> str:
        """For people."""
        if self.dtype != "float32" or self.training == self.decoding == "highest":
            return self.dtype
        return f"float32 ({self.training} while training, {self.decoding} while decoding)"


@contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Run float32 matrix products in one of torch's three ways."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(kind)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def arithmetic_for(
    precision: str,
    *,
    width: int,
    device: torch.device,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Arithmetic:
    """Choose, or read what was chosen before; the first process does, for all of them.

    Args:
        precision: "auto", "fp32" or "bf16".
        width: The model's hidden size.
        device: Where it runs.
        folder: Of the stage, which keeps the choice from the first call on.
        ranks: The processes that run it together.
    """
    keep = folder / ARITHMETIC if folder else None
    return ranks.share(partial(_kept_or_chosen, precision, width, device, keep))


def _kept_or_chosen(
    precision: str, width: int, device: torch.device, keep: Path | None
) -> Arithmetic:
    if keep is not None and keep.is_file():
        stored = Arithmetic(**read_json(keep))
        if stored.asked == precision:
            return stored
    chosen = _choose(precision, width, device)
    if keep is not None:
        write_json(keep, asdict(chosen))
    return chosen


def _choose(precision: str, width: int, device: torch.device) -> Arithmetic:
    if device.type != "cpu" or precision == "bf16":
        dtype = dtype_for(precision, device)
        return Arithmetic(precision, str(dtype).removeprefix("torch."))
    if width < NARROW:
        return Arithmetic(precision)
    found = measure(width)
    same = found["error/medium"] <= 4 * found["error/highest"]
    kinds = {
        phase: "medium"
        if same and found[f"{phase}/medium"] > GAIN * found[f"{phase}/highest"]
        else "highest"
        for phase in ROWS
    }
    best = max(found["training/highest"], found[f"training/{kinds['training']}"])
    half = precision == "auto" and found["training/bfloat16"] > GAIN * best
    return Arithmetic(
        precision,
        "bfloat16" if half else "float32",
        kinds["training"],
        kinds["decoding"],
        {name: float(f"{value:.3g}") for name, value in found.items()},
    )


def measure(width: int) -> dict[str, float]:
    """Speed and error of the product at the heart of a layer, [rows, width] x [width, 4 width].

    Returns:
        "<phase>/<arithmetic>": GFLOP/s of the fastest of some repetitions; "error/<arithmetic>":
        norm of the error over norm of the product, against float64.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * width, width, generator=generator)
    found: dict[str, float] = {}
    for phase, rows in ROWS.items():
        x = torch.randn(rows, width, generator=generator)
        for kind in ("highest", "medium"):
            with float32_products(kind):
                found[f"{phase}/{kind}"] = _rate(x, weight)
                if phase == "decoding":
                    found[f"error/{kind}"] = _error(x, weight)
        found[f"{phase}/bfloat16"] = _rate(x.bfloat16(), weight.bfloat16())
    return found


def _rate(x: Tensor, weight: Tensor) -> float:
    torch.nn.functional.linear(x, weight)
    begin, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < SECONDS:
        at = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - at)
    return 2 * x.shape[0] * weight.numel() / best / 1e9


def _error(x: Tensor, weight: Tensor) -> float:
    exact = torch.nn.functional.linear(x.double(), weight.double())
    off = torch.nn.functional.linear(x, weight).double() - exact
    return float(off.norm() / exact.norm())
