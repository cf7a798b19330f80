"""The plain way to do the same: `generate`, padded batches, logits of every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from suasion.functional.losses import clipped_surrogate, clipped_value_loss

Autocast = Callable[[], Any]


class Limits(StoppingCriteria):
    """Ends each row at a length of its own, as an EOS would.

    Args:
        limits: Longest response of each row, tokens, [B].
        start: Tokens of the padded prompts.
    """

    def __init__(self, limits: Tensor, start: int) -> None:
        self._limits = limits
        self._start = start

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Any:
        """True where a row is over, bool, [B]."""
        return self._limits <= ids.shape[1] - self._start


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], pad_id: int
) -> list[list[int]]:
    """Sample responses with the library's `generate`."""
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    mask = (ids != pad_id).long()
    found = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(limits),
        pad_token_id=pad_id,
        stopping_criteria=StoppingCriteriaList(
            [Limits(torch.tensor(limits, device=device), longest)]
        ),
    )[:, longest:].tolist()
    return [row[:limit] for row, limit in zip(found, limits, strict=True)]


class PaddedUpdate:
    """PPO on right-padded batches, every logit computed.

    Args:
        model: The policy.
        reference: A frozen copy.
        head: Gives values from hidden states.
        optimizer: Over policy and head.
        autocast: Context of each forward pass.
        micro: Rows of a forward and backward pass.
    """

    def __init__(
        self, model: Any, reference: Any, head: Any, optimizer: Any, autocast: Autocast, micro: int
    ) -> None:
        self.model = model
        self.reference = reference
        self.head = head
        self.optimizer = optimizer
        self.autocast = autocast
        self.micro = micro

    def forward(self, model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of every next token and values, [B, T - 1]."""
        with self.autocast():
            out = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
            values = self.head(out.hidden_states[-1].float()).squeeze(-1)
        logprobs = out.logits[:, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0], values[:, :-1]

    @torch.no_grad()
    def known(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Old log-probabilities, the reference's, and values, [B, T - 1] each."""
        parts = []
        for rows in torch.arange(len(ids), device=ids.device).split(self.micro):
            old, values = self.forward(self.model, ids[rows], mask[rows])
            parts.append((old, self.forward(self.reference, ids[rows], mask[rows])[0], values))
        old, held, values = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        return old, held, values

    def step(
        self, ids: Tensor, mask: Tensor, counts: Tensor, old: Tensor, values: Tensor, gains: Tensor
    ) -> None:
        """One optimizer step over all rows; `counts` is True at response tokens, [B, T - 1]."""
        total = counts.sum()
        returns = values + gains
        self.optimizer.zero_grad(set_to_none=True)
        for rows in torch.arange(len(ids), device=ids.device).split(self.micro):
            new, found = self.forward(self.model, ids[rows], mask[rows])
            policy_loss = clipped_surrogate(
                new, old[rows], gains[rows], clip_low=0.2, clip_high=0.2
            )
            value_loss = clipped_value_loss(found, values[rows], returns[rows], clip=0.2)
            loss = ((policy_loss + 0.1 * value_loss) * counts[rows]).sum() / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
