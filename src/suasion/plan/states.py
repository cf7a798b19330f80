"""What optimizers keep per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 1 << 16
"""Elements on which the states of an optimizer are measured that only runs on real tensors."""


def state_tensors(optimizer: torch.optim.Optimizer, parameters: list[Any]) -> list[Tensor]:
    """The tensors an optimizer keeps for some parameters."""
    return [
        value
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, Tensor)
    ]


class Stored(torch.optim.Optimizer):
    """Holds as many bytes as another optimizer would, and takes no step.

    Args:
        groups: Parameter groups.
        size: Elements of a parameter -> bytes of its states.
    """

    def __init__(self, groups: Any, size: Callable[[int], int]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._size = size

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states, where they are not there yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    size = self._size(parameter.numel())
                    # As large as asked, and never a small tensor that would be made for real.
                    made = parameter.new_empty(size, dtype=torch.uint8)
                    self.state[parameter]["states"] = made


def measured_states(kind: Callable[..., Any], options: dict[str, Any]) -> Callable[[int], int]:
    """Bytes of states as a function of a parameter's elements, from one step on real tensors.

    For optimizers whose kernels read memory themselves (bitsandbytes), and so cannot run on tensors
    without contents. Small parameters are often treated otherwise, so each size up to `SAMPLE` is
    measured as it is.
    """
    known: dict[int, int] = {}

    def size(elements: int) -> int:
        sample = min(elements, SAMPLE)
        if sample not in known:
            parameter = nn.Parameter(torch.zeros(sample))
            optimizer = kind([{"params": [parameter]}], lr=1e-9, **options)
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            tensors = state_tensors(optimizer, [parameter])
            # A quantisation map is shared by all parameters of a process.
            known[sample] = sum(t.numel() * t.element_size() for t in tensors if t.numel() != 256)
        return known[sample] * elements // sample

    return size
