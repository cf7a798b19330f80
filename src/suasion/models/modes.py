"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Give every submodule its training or evaluation mode back at the end."""
    before: list[tuple[Any, bool]] = [(m, m.training) for each in modules for m in each.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
