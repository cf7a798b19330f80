"""Records that cross rooms. Shapes: B responses, T positions, R response positions, N tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Whole sequences, query then response, padded on the right.

    Padding on the right needs no position ids of its own and, under a causal mask, cannot reach any
    real token, in any family.
    """

    ids: Tensor
    """Token ids, int64, [B, T]."""
    mask: Tensor
    """True at real tokens, bool, [B, T]."""
    predicts: Tensor
    """True where the next token belongs to the response, bool, [B, T]."""

    @property
    def targets(self) -> Tensor:
        """The response tokens of all rows, one after the other, int64, [N]."""
        return self.ids[:, 1:][self.predicts[:, :-1]]

    @property
    def ends(self) -> Tensor:
        """True at the last token of each row, bool, [B, T]."""
        after = torch.zeros_like(self.mask)
        after[:, :-1] = self.mask[:, 1:]
        return self.mask & ~after

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on `device`."""
        return TokenBatch(self.ids.to(device), self.mask.to(device), self.predicts.to(device))


def token_batch(
    queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> TokenBatch:
    """Join queries and responses into a right-padded batch."""
    lengths = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
    shape = (len(lengths), max(lengths))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    predicts = torch.zeros(shape, dtype=torch.bool)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids[row, : lengths[row]] = torch.tensor([*query, *response], dtype=torch.long)
        mask[row, : lengths[row]] = True
        predicts[row, len(query) - 1 : lengths[row] - 1] = True
    return TokenBatch(ids, mask, predicts)


@dataclass(frozen=True)
class Rollout:
    """Responses as they were sampled.

    The lengths are those of the sampling itself, never read off padding, so the padding token may
    equal the EOS. A response that ended by itself includes the token that ended it.
    """

    queries: list[list[int]]
    """Prompt tokens."""
    responses: list[list[int]]
    """Response tokens, at least one each."""
    finished: list[bool]
    """Whether the response ended by itself (rather than at its length limit)."""
    logprobs: list[Tensor]
    """Log-probability of each response token before any top-k or top-p filter, nats."""
    values: list[Tensor] | None
    """The critic's value before each response token, where it shares the policy's trunk."""
    reasons: list[str] = field(default_factory=list)
    """Why each ended: "stop" (a stop token), "stop string", or "length"."""
    altered: bool = False
    """Whether tokens were drawn from another distribution than `logprobs` describes."""

    def __len__(self) -> int:
        return len(self.responses)

    def split(self) -> list[Rollout]:
        """Each response as a rollout of its own."""
        return [
            Rollout(
                self.queries[row : row + 1],
                self.responses[row : row + 1],
                self.finished[row : row + 1],
                self.logprobs[row : row + 1],
                None if self.values is None else self.values[row : row + 1],
                self.reasons[row : row + 1],
                self.altered,
            )
            for row in range(len(self))
        ]

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """The responses of all `parts`, of which there is at least one, in their order."""

        def every(name: str) -> list[Any]:
            return [row for part in parts for row in getattr(part, name)]

        return cls(
            every("queries"),
            every("responses"),
            every("finished"),
            every("logprobs"),
            None if parts[0].values is None else every("values"),
            every("reasons"),
            any(part.altered for part in parts),
        )


def padded(rows: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """Stack rows of different length into [B, R], filled on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
