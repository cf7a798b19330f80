"""Bytes of tensors that are held while code runs, counted exactly: no allocator, no noise."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the memory of every tensor that operations make within it.

    What kernels allocate and let go by themselves is not seen.

    Args:
        before: Tensors that are held already; memory they share counts once.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.now = 0
        for tensor in before:
            self._book(tensor)
        self.begun = self.now
        """Bytes of what was held before."""
        self.peak = self.now
        """Most bytes held at one time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor):
                self._book(found)
        self.peak = max(self.peak, self.now)
        return result

    def _book(self, tensor: Tensor) -> None:
        owner: Any
        if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]  # noqa: SLF001
            # Weights in the order that a kernel wants have no storage to ask.
            owner, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        else:
            owner = tensor.untyped_storage()
            key, size = owner._cdata, owner.nbytes()  # noqa: SLF001
        if key in self._live:
            return
        self._live[key] = size
        self.now += size
        weakref.finalize(owner, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        self.now -= self._live.pop(key)
