"""Policy, reference, critic: who computes what, on whose weights.

All of them see a causal LM as a trunk that gives hidden states and a linear head that turns these
into logits, so that only response positions ever reach the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from suasion.core.errors import ModelError
from suasion.core.records import TokenBatch
from suasion.functional.logprobs import linear_logprobs
from suasion.models.attention import can_pack, run_packed, spare_tokens
from suasion.models.load import score_head
from suasion.models.modes import modes_kept
from suasion.models.scope import AdapterScope

KEPT_LOGITS = 1 << 26
"""Bytes of logits that may be kept from forward to backward pass; more are computed twice."""


class HiddenStates:
    """A transformers causal LM or classifier, seen as trunk and linear head.

    Args:
        model: The model, with adapters or without.
        head: The linear layer on the trunk.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:
        self.model: Any = model
        self.head: Any = head
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        self.trunk = plain.base_model
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.packs = can_pack(plain, self.trunk)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def __call__(self, ids: Tensor, mask: Tensor, **cache: Any) -> Any:
        """Run the trunk.

        Args:
            ids: Token ids, [B, T]; with a cache, only the new ones.
            mask: True at real tokens, [B, T] (with a cache, of old and new tokens).
            cache: `past_key_values` and `use_cache`, where decoding.

        Returns:
            The trunk's output; `last_hidden_state` is [B, T, D].
        """
        if self.takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            cache["position_ids"] = positions[:, -ids.shape[1] :]
        cache.setdefault("use_cache", False)
        return self.trunk(input_ids=ids, attention_mask=mask.long(), **cache)

    def at(self, batch: TokenBatch, where: Tensor) -> Tensor:
        """Hidden states at chosen positions, row by row.

        Sequences run side by side without padding where the model allows it.

        Args:
            batch: Whole sequences.
            where: Positions wanted, bool, [B, T].

        Returns:
            [N, D].
        """
        if not self.packs:
            return self(batch.ids, batch.mask).last_hidden_state[where]
        lengths = batch.mask.sum(-1).tolist()
        ids, wanted = batch.ids[batch.mask], where[batch.mask]
        spare = spare_tokens(lengths)
        ids = torch.cat([ids, ids.new_zeros(sum(spare))])
        return run_packed(self.trunk, ids, lengths + spare)[: len(wanted)][wanted]


class Policy(HiddenStates):
    """A causal language model that answers and is trained.

    Args:
        model: The model, with adapters or without; its dropout must be off.
        temperature: Logits are divided by it, in sampling and in every log-probability.
        scope: Switches the model's adapters; the policy is the one that is active at rest.
    """

    def __init__(self, model: Any, temperature: float, scope: AdapterScope | None = None) -> None:
        super().__init__(model, model.get_output_embeddings())
        if isinstance(self.head, BaseTunerLayer):
            raise ModelError(
                "the output head has an adapter, which log-probabilities in chunks leave out",
                "name other layers in lora.targets",
            )
        self.temperature = temperature
        self.scope = scope
        self.decoding_head: Callable[[Tensor], Tensor] | None = None
        self._prove_head()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits divided by the temperature, in float32, [..., V]."""
        return (self.decoding_head or self.head)(hidden).float() / self.temperature

    def logprobs(
        self, batch: TokenBatch, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities of the response tokens.

        Args:
            batch: Whole sequences.
            with_entropy: Compute the exact entropy of each distribution too.

        Returns:
            Log-probabilities [N] and entropies [N] (nats), and the hidden states [N, D] they came
            from, which a critic on the same trunk reads.
        """
        hidden = self.at(batch, batch.predicts)
        found, entropy = linear_logprobs(
            hidden,
            self.head.weight,
            getattr(self.head, "bias", None),
            batch.targets,
            self.temperature,
            with_entropy=with_entropy,
            keep=torch.is_grad_enabled() and 4 * len(hidden) * len(self.head.weight) <= KEPT_LOGITS,
        )
        return found, entropy, hidden

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that learn as the policy's, by name: other adapters' learn too."""
        if self.scope is not None:
            return self.scope.parameters(self.scope.resting)
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def module(self) -> nn.Module:
        """What the policy trains and saves in checkpoints."""
        return self.model if self.scope is None else Weights(self.trainable())

    def _prove_head(self) -> None:
        """Refuse a family whose logits are not the head of the hidden states (soft-capping)."""
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.head.weight.shape[0]
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad(), modes_kept(self.model):
            self.model.eval()  # dropout would make any two passes differ
            ours = self.head(self(ids, mask).last_hidden_state)
            theirs = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        if bool(theirs.isnan().any()):
            raise ModelError(
                f"{type(self.model).__name__} gives logits that are not numbers",
                "its weights, or an adapter's, hold values that are not finite: take an earlier "
                "folder, or load it in another precision",
            )
        if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(self.model).__name__} changes its logits after the output head",
                "families with soft-capped or scaled logits are not supported yet",
            )


class AdapterStates(HiddenStates):
    """A shared base seen through one of its adapters, with a head of its own.

    Args:
        model: The peft model.
        head: The linear layer on the trunk.
        scope: Switches the model's adapters.
        adapter: The one this role computes with.
    """

    def __init__(self, model: Any, head: nn.Module, scope: AdapterScope, adapter: str) -> None:
        super().__init__(model, head)
        self.scope = scope
        self.adapter = adapter

    def __call__(self, ids: Tensor, mask: Tensor, **cache: Any) -> Any:
        """Run the trunk with the adapter; see `HiddenStates`."""
        with self.scope.use(self.adapter):
            return super().__call__(ids, mask, **cache)

    def at(self, batch: TokenBatch, where: Tensor) -> Tensor:
        """Hidden states at chosen positions, [N, D], with the adapter; see `HiddenStates`."""
        with self.scope.use(self.adapter):
            return super().at(batch, where)


class Weights(nn.Module):
    """Some parameters of a model as a module: to train, move and save them and no others.

    Args:
        named: The parameters by name; they stay the model's own.
        head: A layer beside them.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], head: nn.Module | None = None
    ) -> None:
        super().__init__()
        for name, parameter in named:
            self.register_parameter(name.replace(".", "/"), parameter)  # a dot would nest
        if head is not None:
            self.head = head


class Critic(Protocol):
    """Estimates the return from each response position on."""

    on_trunk: bool
    """Whether it reads the policy's hidden states instead of running a model of its own."""
    module: nn.Module
    """What it trains and saves."""

    def turn(self) -> AbstractContextManager[None]:
        """What must hold around a forward pass with gradient and its backward pass."""
        ...

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]; `hidden` [N, D] are the policy's."""
        ...


class TrunkCritic:
    """A scalar head on the policy's hidden states.

    It starts at zero, so the first advantages are the returns themselves
    (openai/lm-human-preferences@cbfd210b starts its value head so too).
    """

    on_trunk = True

    def __init__(self, hidden_size: int) -> None:
        self.module: Any = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def turn(self) -> AbstractContextManager[None]:
        """Nothing: the policy's hidden states are there."""
        return nullcontext()

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]."""
        return self.of(hidden)

    def of(self, hidden: Tensor) -> Tensor:
        """Values of hidden states, [..., D] -> [...]."""
        return self.module(hidden.to(self.module.weight.dtype)).squeeze(-1)


class ModelCritic:
    """A model of its own with a scalar head, usually a copy of the reward model.

    Args:
        model: A sequence-classification model with one output, over the policy's vocabulary.
    """

    on_trunk = False

    def __init__(self, model: Any) -> None:
        self.module: nn.Module = model
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        self._states = HiddenStates(model, score_head(plain))

    def turn(self) -> AbstractContextManager[None]:
        """Nothing: its weights are its own."""
        return nullcontext()

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]."""
        return self._states.head(self._states.at(batch, batch.predicts)).squeeze(-1)


class AdapterCritic:
    """An adapter on the policy's base with a scalar head, usually begun as the reward model's.

    Args:
        states: The base through the critic's adapter.
    """

    on_trunk = False

    def __init__(self, states: AdapterStates) -> None:
        self.states = states
        self.module: nn.Module = Weights(states.scope.parameters(states.adapter), states.head)

    def turn(self) -> AbstractContextManager[None]:
        """Its adapter is the active one."""
        return self.states.scope.use(self.states.adapter)

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]."""
        own = self.states.at(batch, batch.predicts)
        found: Tensor = self.states.head(own.to(self.states.head.weight.dtype)).squeeze(-1)
        return found


def hidden_size_of(policy: Policy) -> int:
    """Width of what reaches the output head."""
    return int(policy.head.weight.shape[1])
