"""Policy, reference and critic of the classic trainer, as the core's roles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from suasion.classic.errors import ArgumentError
from suasion.classic.ppo_batch import StepBatch
from suasion.classic.value_head import (
    AutoModelForCausalLMWithValueHead,
    ValueHead,
    create_reference_model,
)
from suasion.core.records import Rollout, TokenBatch, padded, token_batch
from suasion.functional.kl import full_kl
from suasion.models.load import switch_off_dropout
from suasion.models.references import AdapterOffReference, FrozenReference, Reference
from suasion.models.roles import Critic, Policy
from suasion.rollout.experience import Penalty, token_budget


class HeadCritic:
    """A `ValueHead` on the policy's hidden states.

    Args:
        head: Its dropout must be off.
    """

    on_trunk = True

    def __init__(self, head: ValueHead) -> None:
        self.module: nn.Module = head

    def turn(self) -> AbstractContextManager[None]:
        """Nothing: the policy's hidden states are there."""
        return nullcontext()

    def values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:
        """Values before each response token, [N]."""
        found: Tensor = self.module(hidden).squeeze(-1)
        return found


@dataclass(frozen=True)
class ReferenceRole:
    """The reference, and how to run it as a whole model."""

    scorer: Reference
    """Gives log-probabilities."""
    policy: Policy
    """The model, to be run only while `active`."""
    active: Callable[[], AbstractContextManager[Any]]
    """Makes `policy` the reference inside its block."""


def chosen_reference(
    policy: Policy,
    model: AutoModelForCausalLMWithValueHead,
    ref_model: Any,
    num_shared_layers: int | None,
    device: torch.device,
) -> tuple[ReferenceRole, Any]:
    """The reference a trainer gets from its arguments.

    Args:
        policy: The policy.
        model: The policy with its head.
        ref_model: A model with or without a value head, or None.
        num_shared_layers: Layers it shares, see `create_reference_model`.
        device: Where it goes.

    Returns:
        The role, and the reference model or None where adapters are switched off instead.

    Raises:
        ArgumentError: `ref_model` is no model, or layers cannot be shared.
    """
    if ref_model is None and model.is_peft_model and num_shared_layers is None:
        scorer = AdapterOffReference(policy)
        return ReferenceRole(scorer, policy, partial(scorer.scope.use, None)), None
    if ref_model is None:
        ref_model = create_reference_model(model, num_shared_layers)
    elif num_shared_layers is not None:
        warnings.warn(
            "num_shared_layers is not used: ref_model is given", UserWarning, stacklevel=3
        )
    plain = getattr(ref_model, "pretrained_model", ref_model)
    if not isinstance(plain, PreTrainedModel) and not hasattr(plain, "peft_config"):
        raise ArgumentError(
            f"ref_model is a {type(ref_model).__name__}, not a causal language model",
            "give an AutoModelForCausalLMWithValueHead, or None",
        )
    if plain is policy.model:
        raise ArgumentError(
            "ref_model is the very model that is trained, so it would move with it",
            "use create_reference_model(model), or leave ref_model out",
        )
    if not getattr(plain, "hf_device_map", None):
        ref_model.to(device)
    switch_off_dropout(ref_model)
    frozen = FrozenReference(plain, policy.temperature)
    return ReferenceRole(frozen, Policy(plain, policy.temperature), nullcontext), ref_model


@torch.no_grad()
def scored_rollout(
    batch: StepBatch,
    policy: Policy,
    critic: Critic,
    *,
    stop_ids: list[int],
    pad_id: int,
    batch_tokens: int,
) -> Rollout:
    """Responses from anywhere with the policy's log-probabilities and values.

    Args:
        batch: What a script gave to `step`.
        policy: The policy.
        critic: On the policy's trunk.
        stop_ids: Tokens that end a response.
        pad_id: Fills batches.
        batch_tokens: Most tokens in one forward pass.
    """
    logprobs: list[Tensor] = [torch.empty(0)] * len(batch.responses)
    values = list(logprobs)
    for rows in token_budget(batch.lengths, batch_tokens):
        part = _tokens(batch.queries, batch.responses, rows, pad_id).to(policy.device)
        found, _, hidden = policy.logprobs(part)
        worth = critic.values(part, hidden).float()
        sizes = [len(batch.responses[row]) for row in rows]
        for row, flat, value in zip(rows, found.split(sizes), worth.split(sizes), strict=True):
            logprobs[row], values[row] = flat, value
    finished = [response[-1] in stop_ids for response in batch.responses]
    return Rollout(batch.queries, batch.responses, finished, logprobs, values)


def full_penalty(
    policy: Policy, reference: ReferenceRole, rollout: Rollout, pad_id: int, batch_tokens: int
) -> Penalty:
    """The KL over the whole vocabulary at each response token, as a penalty.

    Args:
        policy: The policy.
        reference: What it is held to.
        rollout: The responses.
        pad_id: Fills batches.
        batch_tokens: Most tokens in one forward pass; the logits of as many exist, twice.

    Returns:
        A function of log-probabilities it has no use for, giving [B, R].
    """

    @torch.no_grad()
    def penalty(logprobs: Tensor, _ref_logprobs: Tensor) -> Tensor:
        found: list[Tensor] = [torch.empty(0)] * len(rollout)
        lengths = [len(q) + len(r) for q, r in zip(rollout.queries, rollout.responses, strict=True)]
        for rows in token_budget(lengths, batch_tokens):
            part = _tokens(rollout.queries, rollout.responses, rows, pad_id).to(policy.device)
            logits = _response_logits(policy, part)
            with reference.active():
                ref_logits = _response_logits(reference.policy, part)
            sizes = [len(rollout.responses[row]) for row in rows]
            for row, kl in zip(rows, full_kl(logits, ref_logits).split(sizes), strict=True):
                found[row] = kl
        return padded(found).to(logprobs)

    return penalty


def _response_logits(policy: Policy, batch: TokenBatch) -> Tensor:
    """Logits that predict the response tokens, [N, V]."""
    return policy.logits(policy(batch.ids, batch.mask).last_hidden_state[batch.predicts])


def _tokens(
    queries: list[list[int]], responses: list[list[int]], rows: list[int], pad_id: int
) -> TokenBatch:
    return token_batch([queries[row] for row in rows], [responses[row] for row in rows], pad_id)
