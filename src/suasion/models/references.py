"""What the policy is held to: its own base, a snapshot of its adapter, or a frozen model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from suasion.core.errors import ModelError
from suasion.core.records import TokenBatch
from suasion.models.quantised import hold_rounded
from suasion.models.roles import Policy
from suasion.models.scope import AdapterScope

LAYERS = (
    "transformer.h.{layer}",  # GPT-2, GPT-Neo, GPT-J, BLOOM
    "gpt_neox.layers.{layer}",
    "model.decoder.layers.{layer}",  # OPT
    "model.layers.{layer}",  # Llama, Qwen, Mistral and their relatives
)
"""How the known families name their layers."""
PROBED = 4096
"""Most entries of each tensor that `fingerprint` reads."""


class Reference(Protocol):
    """Gives the log-probabilities the policy is held to."""

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N], without gradient."""
        ...

    def present(self) -> AbstractContextManager[None]:
        """Around several calls of `logprobs`: what has to be fetched for them is fetched once."""
        ...

    def identity(self) -> str:
        """A hash that another reference would not have."""
        ...


class AdapterReference:
    """The policy's base with another adapter, or none: no second copy of the weights.

    Args:
        policy: The policy.
        scope: Switches its model's adapters.
        adapter: A frozen snapshot; None for the base alone.
    """

    def __init__(self, policy: Policy, scope: AdapterScope, adapter: str | None = None) -> None:
        self._policy = policy
        self.scope = scope
        self.adapter = adapter

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N]."""
        with self.scope.use(self.adapter):
            return self._policy.logprobs(batch)[0]

    def present(self) -> AbstractContextManager[None]:
        """Nothing: the base is the policy's."""
        return nullcontext()

    def identity(self) -> str:
        """Hash of the base, and of the snapshot where there is one."""
        named = list(self.scope.base_weights())
        if self.adapter is not None:
            # Without the name it has here: the same weights are the same reference.
            named += [("", weight) for _, weight in self.scope.parameters(self.adapter)]
        return fingerprint(named)


class AdapterOffReference(AdapterReference):
    """The policy's own base, its adapters switched off.

    Args:
        policy: A policy with adapters.

    Raises:
        ModelError: it has none.
    """

    def __init__(self, policy: Policy) -> None:
        if not hasattr(policy.model, "disable_adapter"):
            raise ModelError("a reference by switching adapters off needs a policy with adapters")
        scope = policy.scope or AdapterScope(policy.model, policy.model.active_adapters[0])
        super().__init__(policy, scope)


class FrozenReference:
    """A model of its own that never changes.

    Args:
        model: The model; its dropout must be off.
        temperature: The policy's.
        device: Where it computes; set, it waits in the processor's memory until it is asked.
    """

    def __init__(
        self, model: Any, temperature: float, *, device: torch.device | None = None
    ) -> None:
        model.requires_grad_(False)  # noqa: FBT003
        model.eval()
        self._policy = Policy(model, temperature)
        self._away = device
        self._identity: str | None = None

    @classmethod
    def copy_of(cls, policy: Policy, *, shared: Iterable[nn.Parameter] = ()) -> FrozenReference:
        """Freeze a copy of the policy as it is now.

        Args:
            policy: The policy.
            shared: Parameters that both are to hold, and neither to train.
        """
        return cls(frozen_copy(policy.model, shared), policy.temperature)

    @property
    def model(self) -> Any:
        """The model."""
        return self._policy.model

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N]."""
        with self.present():
            return self._policy.logprobs(batch)[0]

    @contextmanager
    def present(self) -> Iterator[None]:
        """The model is where it computes."""
        if self._away is None or self._policy.device == self._away:
            yield
            return
        self.model.to(self._away)
        try:
            yield
        finally:
            self.model.to("cpu")

    def hold_rounded(self, dtype: torch.dtype, *, besides: Container[int] = ()) -> None:
        """Round as `suasion.models.quantised.hold_rounded` does; from then on, under autocast only.

        It is the same reference as before: its identity is that of the weights it came with.
        """
        self._identity = self.identity()
        hold_rounded(self.model, dtype, besides=besides)

    def identity(self) -> str:
        """Hash of the weights."""
        return self._identity or fingerprint(self.model.named_parameters())


def frozen_copy(model: Any, shared: Iterable[nn.Parameter] = ()) -> Any:
    """A copy whose weights do not train, holding the `shared` ones in common with `model`.

    Shared parameters are the very same tensors in both: they cost no memory, and they are frozen in
    `model` as well, or the copy would move with it.
    """
    memo: dict[int, Any] = {}
    for parameter in shared:
        parameter.requires_grad = False
        memo[id(parameter)] = parameter
    copied = copy.deepcopy(model, memo)
    copied.requires_grad_(requires_grad=False)
    return copied.eval()


def front_parameters(
    model: nn.Module, layers: int, patterns: Iterable[str] = LAYERS
) -> list[nn.Parameter] | None:
    """Parameters in front of layer number `layers`; None where no pattern names such a layer.

    Args:
        model: A causal LM.
        layers: How many layers count, 1 or more.
        patterns: Names of a layer with `{layer}` for its number.
    """
    named = list(model.named_parameters())
    for pattern in patterns:
        start = pattern.format(layer=layers) + "."
        at = next((i for i, (name, _) in enumerate(named) if name.startswith(start)), None)
        if at is not None:
            return [parameter for _, parameter in named[:at]]
    return None


@torch.no_grad()
def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors: their names, types and shapes, and entries spread evenly over each.

    Not every entry, since a large model would take minutes; training moves them all.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        entries = flat[:: max(1, flat.numel() // PROBED)][:PROBED].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(entries.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
