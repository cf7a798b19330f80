"""Policy, reference, critic: who computes what, on whose weights.

All of them see a causal LM as a trunk that gives hidden states and a linear head that turns these
into logits, so that only response positions ever reach the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from suasion.core.errors import ModelError
from suasion.core.records import TokenBatch
from suasion.functional.logprobs import linear_logprobs
from suasion.models.load import score_head


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


class Policy(HiddenStates):
    """A causal language model that answers and is trained.

    Args:
        model: The model, with adapters or without; its dropout must be off.
        temperature: Logits are divided by it, in sampling and in every log-probability.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__(model, model.get_output_embeddings())
        self.temperature = temperature
        self._prove_head()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits divided by the temperature, in float32, [..., V]."""
        return self.head(hidden).float() / self.temperature

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
        hidden = self(batch.ids, batch.mask).last_hidden_state[batch.predicts]
        found, entropy = linear_logprobs(
            hidden,
            self.head.weight,
            getattr(self.head, "bias", None),
            batch.targets,
            self.temperature,
            with_entropy=with_entropy,
        )
        return found, entropy, hidden

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that learn, by name."""
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _prove_head(self) -> None:
        """Refuse a family whose logits are not the head of the hidden states (soft-capping)."""
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.head.weight.shape[0]
        mask = torch.ones_like(ids, dtype=torch.bool)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # dropout would make any two passes differ
        with torch.no_grad():
            ours = self.head(self(ids, mask).last_hidden_state)
            theirs = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        for module in training:
            module.training = True
        if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(self.model).__name__} changes its logits after the output head",
                "families with soft-capped or scaled logits are not supported yet",
            )


class Reference(Protocol):
    """Gives the log-probabilities the policy is held to."""

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N], without gradient."""
        ...


class AdapterOffReference:
    """The policy's own base, its adapters switched off: no second copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        if not hasattr(policy.model, "disable_adapter"):
            raise ModelError("a reference by switching adapters off needs a policy with adapters")
        self._policy = policy

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N]."""
        with self._policy.model.disable_adapter():
            return self._policy.logprobs(batch)[0]


class FrozenReference:
    """A model of its own that never changes."""

    def __init__(self, model: Any, temperature: float) -> None:
        model.requires_grad_(False)  # noqa: FBT003
        model.eval()
        self._policy = Policy(model, temperature)

    @classmethod
    def copy_of(cls, policy: Policy) -> FrozenReference:
        """Freeze a copy of the policy as it is now."""
        return cls(copy.deepcopy(policy.model), policy.temperature)

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [N]."""
        return self._policy.logprobs(batch)[0]


class Critic(Protocol):
    """Estimates the return from each response position on."""

    on_trunk: bool
    """Whether it reads the policy's hidden states instead of running a model of its own."""
    module: nn.Module
    """What it trains and saves."""

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

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]."""
        own = self._states(batch.ids, batch.mask).last_hidden_state[batch.predicts]
        return self._states.head(own).squeeze(-1)


def hidden_size_of(policy: Policy) -> int:
    """Width of what reaches the output head."""
    return int(policy.head.weight.shape[1])
