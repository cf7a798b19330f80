"""An optimizer that no library here has, to be named by its import path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            first, second = group["betas"]
            for each in group["params"]:
                if each.grad is None:
                    continue
                state = self.state[each]
                momentum = state.setdefault("momentum", torch.zeros_like(each))
                each.sub_(group["lr"] * torch.sign(first * momentum + (1 - first) * each.grad))
                momentum.mul_(second).add_(each.grad, alpha=1 - second)


def not_an_optimizer(params: Any, lr: float) -> list[float]:
    """Callable like one."""
    return [lr for _ in params]
