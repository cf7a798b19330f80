"""Sampling responses: prefill once, then one token at a time; rows that ended leave the batch.

Each prompt has its own stream of uniform numbers, so a response does not depend on which other
prompts are in the batch or in what order. Log-probabilities (and the values of a critic on the
policy's trunk) come out of decoding; nothing is computed again for the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from suasion.core.records import Rollout
from suasion.models.roles import Policy


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the policy's distribution (temperature is the policy's own)."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass."""
    greedy: bool = False
    """Take the likeliest token instead of drawing."""

    @property
    def alters_distribution(self) -> bool:
        """Whether samples follow another distribution than the log-probabilities describe."""
        return self.greedy or self.top_k > 0 or self.top_p < 1.0


@torch.no_grad()
def sample(
    policy: Policy,
    queries: Sequence[Sequence[int]],
    limits: Sequence[int],
    uniforms: Sequence[Tensor],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
    value: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Sample one response for each query.

    Args:
        policy: The model; put it into evaluation mode or switch its dropout off before.
        queries: Prompt tokens, at least one each.
        limits: Longest response of each query, tokens.
        uniforms: For each query, at least `limits` numbers in [0, 1), float64.
        stop_ids: Tokens that end a response.
        pad_id: Fills shorter prompts on the left; may equal a stop token.
        sampling: How tokens are drawn; None draws from the full distribution.
        value: Turns hidden states [n, D] into values [n]; None leaves values out.

    Returns:
        Responses in the order of the queries, with log-probabilities under the full distribution.
    """
    decoding = _Decoding(policy, queries, limits, uniforms, stop_ids, sampling or Sampling(), value)
    decoding.prefill(pad_id)
    while decoding.step():
        pass
    return decoding.result()


class _Decoding:
    """The rows still being decoded, and what was sampled so far."""

    def __init__(
        self,
        policy: Policy,
        queries: Sequence[Sequence[int]],
        limits: Sequence[int],
        uniforms: Sequence[Tensor],
        stop_ids: Sequence[int],
        sampling: Sampling,
        value: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.policy = policy
        self.queries = [list(query) for query in queries]
        self.sampling = sampling
        self.value = value
        device = policy.device
        count, longest = len(queries), max(limits)
        self.limits = torch.tensor(list(limits), device=device)
        self.uniforms = torch.stack(
            [row[:longest] if len(row) >= longest else _extend(row, longest) for row in uniforms]
        ).to(device)
        self.stops = torch.tensor(list(stop_ids), device=device)
        self.cache = DynamicCache(config=policy.model.config)
        self.rows = torch.arange(count, device=device)
        self.live = torch.ones(count, dtype=torch.bool, device=device)
        self.time = 0
        self.tokens = torch.zeros(count, longest, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, longest, device=device)
        self.values = torch.zeros(count, longest, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)

    def prefill(self, pad_id: int) -> None:
        """Run the prompts, padded on the left, and keep the last hidden state of each."""
        device = self.policy.device
        longest = max(len(query) for query in self.queries)
        ids = torch.full((len(self.queries), longest), pad_id, device=device)
        self.mask = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        for row, query in enumerate(self.queries):
            ids[row, longest - len(query) :] = torch.tensor(query, device=device)
            self.mask[row, longest - len(query) :] = True
        out = self.policy(ids, self.mask, past_key_values=self.cache, use_cache=True)
        self.hidden = out.last_hidden_state[:, -1]

    def step(self) -> bool:
        """Draw the next token of every row; False once all have ended."""
        logits = self.policy.logits(self.hidden)
        logprobs = logits.log_softmax(-1)
        token = _draw(logprobs, self.uniforms[self.rows, self.time], self.sampling)
        writing, at = self.rows[self.live], self.time
        self.tokens[writing, at] = token[self.live]
        self.logprobs[writing, at] = logprobs.gather(-1, token[:, None])[self.live, 0]
        if self.value is not None:
            self.values[writing, at] = self.value(self.hidden)[self.live].float()
        self.time += 1
        self.lengths[writing] = self.time
        stopped = torch.isin(token, self.stops)
        self.finished[self.rows[self.live & stopped]] = True
        self.live = self.live & ~stopped & (self.limits[self.rows] > self.time)
        if not self.live.any():
            return False
        token = self._compact(token)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
        out = self.policy(token[:, None], self.mask, past_key_values=self.cache, use_cache=True)
        self.hidden = out.last_hidden_state[:, -1]
        return True

    def _compact(self, token: Tensor) -> Tensor:
        """Drop ended rows once they are a quarter of the batch: copying the cache costs too."""
        if int(self.live.sum()) > 0.75 * len(self.rows):
            return token
        keep = self.live.nonzero().squeeze(-1)
        self.cache.batch_select_indices(keep)
        self.rows, self.mask, self.live = self.rows[keep], self.mask[keep], self.live[keep]
        return token[keep]

    def result(self) -> Rollout:
        """What was sampled, row by row."""
        lengths = self.lengths.tolist()
        tokens, logprobs, values = self.tokens.cpu(), self.logprobs.cpu(), self.values.cpu()
        return Rollout(
            queries=self.queries,
            responses=[tokens[row, :length].tolist() for row, length in enumerate(lengths)],
            finished=self.finished.tolist(),
            logprobs=[logprobs[row, :length].clone() for row, length in enumerate(lengths)],
            values=None
            if self.value is None
            else [values[row, :length].clone() for row, length in enumerate(lengths)],
        )


def _extend(row: Tensor, length: int) -> Tensor:
    """Pad a row of uniforms that is only as long as its own limit."""
    return torch.cat([row, row.new_zeros(length - len(row))])


def _draw(logprobs: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens by inverting the cumulative distribution, [n, V] and [n] -> [n].

    In float64: over a large vocabulary a float32 sum is off by more than rare tokens weigh.
    """
    if sampling.greedy:
        return logprobs.argmax(-1)
    probs = _filtered(logprobs, sampling).double()
    cumulative = probs.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = logprobs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)


def _filtered(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after top-k and top-p, not normalised."""
    probs = logprobs.exp()
    if sampling.top_k:
        kth = probs.topk(min(sampling.top_k, probs.shape[-1]), dim=-1).values[:, -1:]
        probs = probs * (probs >= kth)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    return probs
