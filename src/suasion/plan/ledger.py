"""Memory of a computation that is not carried out: every tensor is booked, large ones are empty.

Under `FakeTensorMode` a model of any size runs its own forward, backward and optimizer code on
tensors that have shapes and no contents. `Ledger` listens to what that code allocates and lets go,
so the peak of a training step comes from the step itself, not from a formula about it, and holds
for any family. Small tensors made from nothing but small tensors (token ids, masks, lengths) are
real, so code may ask them for their values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZER = "optimizer"
GRADIENTS = "gradients"
KV_CACHE = "kv_cache"
LOGITS = "logits"
CASTS = "casts"
ACTIVATIONS = "activations"
BOOKED = (OPTIMIZER, GRADIENTS, KV_CACHE, LOGITS, CASTS, ACTIVATIONS)
"""What a ledger tells apart; casts are weights turned into another type for one operation."""

SMALL = 1 << 22
"""Most elements of a tensor that is computed for real."""

_aten = torch.ops.aten
_SCALAR = _aten._local_scalar_dense.default  # noqa: SLF001
_COMPARISONS = (_aten.allclose.default, _aten.equal.default)
# Kernels that allocate as much as their input where no dispatcher sees it: exp(x - max).
_HIDDEN = (_aten.logsumexp.default,)


def without_contents() -> FakeTensorMode:
    """Context in which large tensors that are made have shapes and no contents."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes were held."""

    parts: dict[str, int]
    """Bytes by label at that moment."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """Books every allocation within it; to be entered inside `without_contents`.

    A question about the value of an empty tensor is answered with zero, two of them compare as
    equal, and a small real tensor into which an empty one would be written stays as it is.

    Args:
        vocabulary: Size of the last axis by which logits are told from other activations.
    """

    def __init__(self, *, vocabulary: int = 0) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._live: dict[int, int] = {}  # storage -> number of its entry
        self._entries: list[tuple[int, str]] = []  # bytes and label, by number
        self._moves: list[tuple[int, int]] = []  # number of the entry, +1 or -1
        self._known: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation, for real if it is small, and book what it returns."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in given) and _small(args, given):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        elif func is _SCALAR:
            return 0.0 if args[0].is_floating_point() else 0
        elif func in _COMPARISONS:
            return True
        elif _writes(func) and given and given[0] is args[0] and type(args[0]) is Tensor:
            return args[0]
        else:
            if func is _aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            result = func(*args, **kwargs)
        casts = func is _aten._to_copy.default and _key(args[0]) in self._known  # noqa: SLF001
        for found in tree_leaves(result):
            if isinstance(found, Tensor):
                self._book(found, CASTS if casts else None)
        if func in _HIDDEN:
            self._pass_through(args[0])
        return result

    def know(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Count no longer what is counted elsewhere; those of `tensors` that are new to it."""
        fresh = []
        for tensor in tensors:
            key = _key(tensor)
            if key not in self._known:
                self._known[key] = tensor
                self._live.pop(key, None)
                fresh.append(tensor)
        return fresh

    def label(self, tensors: Iterable[Tensor | None], label: str) -> None:
        """Say what tensors that are booked are."""
        for tensor in tensors:
            number = None if tensor is None else self._live.get(_key(tensor))
            if number is not None:
                self._entries[number] = (self._entries[number][0], label)

    def label_rest(self, label: str, before: int) -> None:
        """Say what everything is that was booked after `count` was `before`, and is held still."""
        for number in self._live.values():
            if number >= before:
                self._entries[number] = (self._entries[number][0], label)

    @property
    def count(self) -> int:
        """Entries so far."""
        return len(self._entries)

    def start(self) -> None:
        """Forget what happened; what is held now is held from the beginning."""
        self._moves = [(number, 1) for number in self._live.values()]

    def peak(self) -> Peak:
        """The moment since `start` at which most bytes were held, as now labelled."""
        now = top = at = 0
        for index, (number, sign) in enumerate(self._moves):
            now += sign * self._entries[number][0]
            if now > top:
                top, at = now, index + 1
        parts = dict.fromkeys(BOOKED, 0)
        for number, sign in self._moves[:at]:
            size, label = self._entries[number]
            parts[label] += sign * size
        return Peak(parts)

    def _book(self, tensor: Tensor, label: str | None) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._live or key in self._known:
            return
        if label is None:
            is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
            label = LOGITS if is_logits else ACTIVATIONS
        number = len(self._entries)
        self._entries.append((storage.nbytes(), label))
        self._moves.append((number, 1))
        self._live[key] = number
        weakref.finalize(storage, self._let_go, key, number).atexit = False

    def _let_go(self, key: int, number: int) -> None:
        if self._live.get(key) == number:
            del self._live[key]
        self._moves.append((number, -1))

    def _pass_through(self, tensor: Tensor) -> None:
        """Book a temporary as large as `tensor`, already let go."""
        number = len(self._entries)
        self._entries.append((tensor.numel() * tensor.element_size(), LOGITS))
        self._moves += [(number, 1), (number, -1)]


def _key(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else -1  # noqa: SLF001


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)  # noqa: SLF001


def _small(args: Sequence[Any], given: Sequence[Tensor]) -> bool:
    """Whether the result, as large as the inputs spread over each other, is small."""
    if given:
        try:
            return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in given))) <= SMALL
        except RuntimeError:  # they do not spread: an index, a concatenation, a product
            return sum(tensor.numel() for tensor in given) <= SMALL
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return math.prod(size for size in shape if isinstance(size, int)) <= SMALL


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks among `indices` as the positions they select."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
            found.append(index)
            continue
        with unset_fake_temporarily():
            found += index.nonzero().unbind(1)
    return found
