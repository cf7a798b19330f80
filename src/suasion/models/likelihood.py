"""How likely a model finds texts: perplexity over whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from suasion.core.errors import DataError
from suasion.core.records import token_batch
from suasion.models.roles import Policy


@torch.no_grad()
def perplexity(
    policy: Policy, documents: Sequence[Sequence[int]], *, pad_id: int, batch_tokens: int = 16384
) -> float:
    """Exponential of the mean negative log-likelihood of all tokens but each first one.

    The mean is over the tokens of all documents together, not over documents, so that it does not
    depend on how they are batched.

    Args:
        policy: The model, at temperature 1.
        documents: Token ids; those shorter than two tokens do not count.
        pad_id: Fills batches.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        DataError: no document has two tokens.
    """
    usable = sorted((d for d in documents if len(d) > 1), key=len, reverse=True)
    if not usable:
        raise DataError("perplexity needs at least one text of two tokens")
    policy.model.eval()
    total, tokens = 0.0, 0
    while usable:
        count = max(1, batch_tokens // len(usable[0]))
        chunk, usable = usable[:count], usable[count:]
        batch = token_batch([d[:1] for d in chunk], [d[1:] for d in chunk], pad_id)
        logprobs = policy.logprobs(batch.to(policy.device))[0]
        total -= float(logprobs.double().sum())
        tokens += logprobs.numel()
    return math.exp(min(total / tokens, 700.0))  # exp overflows above 709
