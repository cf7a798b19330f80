"""The sampler's interface over transformers' own `generate`: slower, and written by others.

It is what the sampler is compared with, in tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from suasion.core.records import Rollout
from suasion.models.roles import Policy
from suasion.rollout.sampler import Sampling


@torch.no_grad()
def generate(
    policy: Policy,
    queries: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
) -> Rollout:
    """Sample one response for each query; random numbers are torch's own.

    Args:
        policy: The model.
        queries: Prompt tokens, at least one each.
        limits: Longest response of each query, tokens; what the library goes on with after a
            row's own limit is cut off.
        stop_ids: Tokens that end a response.
        pad_id: Fills shorter prompts on the left.
        sampling: How tokens are drawn; stop strings are not supported.

    Returns:
        Responses in the order of the queries, with log-probabilities under the full distribution.
    """
    sampling = sampling or Sampling()
    longest = max(map(len, queries))
    ids = torch.tensor([[pad_id] * (longest - len(q)) + list(q) for q in queries])
    mask = torch.tensor([[0] * (longest - len(q)) + [1] * len(q) for q in queries])
    out = policy.model.generate(
        ids.to(policy.device),
        attention_mask=mask.to(policy.device),
        max_new_tokens=max(limits),
        min_new_tokens=sampling.min_tokens or None,
        do_sample=not sampling.greedy,
        temperature=None if sampling.greedy else policy.temperature,
        top_k=None if sampling.greedy else sampling.top_k,
        top_p=None if sampling.greedy else sampling.top_p,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1).float() / policy.temperature
    tokens = out.sequences[:, longest:]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].cpu()
    responses, finished = [], []
    for row, limit in zip(tokens.tolist(), limits, strict=True):
        end = next((at + 1 for at, token in enumerate(row) if token in stop_ids), len(row))
        responses.append(row[: min(end, limit)])
        finished.append(responses[-1][-1] in stop_ids)
    return Rollout(
        queries=[list(query) for query in queries],
        responses=responses,
        finished=finished,
        logprobs=[logprobs[row, : len(r)].clone() for row, r in enumerate(responses)],
        values=None,
        reasons=["stop" if ended else "length" for ended in finished],
        altered=sampling.alters_distribution,
    )
