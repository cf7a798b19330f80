"""Sampling responses: prefill once, then one token at a time; what ended leaves the batch.

Each prompt has its own stream of uniform numbers, so a response does not depend on which other
prompts are in the batch or in what order. Log-probabilities (and the values of a critic on the
policy's trunk) come out of decoding; nothing is computed again for the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from suasion.config.schema import ResponseConfig
from suasion.core.errors import TrainingError
from suasion.core.records import Rollout
from suasion.models.roles import Policy
from suasion.rollout.decoders import Decoder, PaddedDecoder, SlotDecoder
from suasion.rollout.weights import decoding_weights

BLOCK = 128
"""Tokens of the vocabulary that are looked at together before one of them is drawn."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the policy's distribution (temperature is the policy's own)."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass."""
    greedy: bool = False
    """Take the likeliest token instead of drawing."""
    min_tokens: int = 0
    """No stop token is drawn before a response has this many."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these."""

    @classmethod
    def of(cls, response: ResponseConfig, *, greedy: bool = False) -> Sampling:
        """As configured."""
        return cls(
            top_k=response.top_k,
            top_p=response.top_p,
            greedy=greedy,
            min_tokens=response.min_tokens,
            stop_strings=response.stop_strings,
        )

    @property
    def alters_distribution(self) -> bool:
        """Whether samples follow another distribution than the log-probabilities describe.

        Stop strings do not: they end a response, and change the chance of no token.
        """
        return self.greedy or self.top_k > 0 or self.top_p < 1.0 or self.min_tokens > 0


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
    slots: int = 256,
    text_of: Callable[[list[int]], str] | None = None,
) -> Rollout:
    """Sample one response for each query.

    Args:
        policy: The model; put it into evaluation mode or switch its dropout off before.
        queries: Prompt tokens, at least one each.
        limits: Longest response of each query, tokens.
        uniforms: For each query, at least `limits` numbers in [0, 1), float64.
        stop_ids: Tokens that end a response.
        pad_id: Fills shorter prompts on the left where the model needs padding; may equal a stop
            token.
        sampling: How tokens are drawn; None draws from the full distribution.
        value: Turns hidden states [n, D] into values [n]; None leaves values out.
        slots: Responses decoded at the same time; the others wait for a place.
        text_of: Turns response tokens into text; needed for stop strings.

    Returns:
        Responses in the order of the queries, with log-probabilities under the full distribution.
    """
    sampling = sampling or Sampling()
    record = _Record(queries, limits, uniforms, stop_ids, policy.device, sampling, text_of)
    decoder: Decoder = (
        SlotDecoder(policy, queries, limits, slots)
        if policy.packs
        else PaddedDecoder(policy, queries, pad_id)
    )
    with decoding_weights(policy):
        _decode(policy, decoder, record, value)
    return record.result()


def _decode(
    policy: Policy, decoder: Decoder, record: _Record, value: Callable[[Tensor], Tensor] | None
) -> None:
    """Draw and run, token by token, until nothing goes on."""
    rows, hidden = decoder.start()
    while len(rows):
        probs = policy.logits(hidden).softmax(-1)
        token = record.draw(rows, probs)
        values = None if value is None else value(hidden).float()
        live = record.add(rows, token, probs.gather(-1, token[:, None])[:, 0].log(), values)
        rows, hidden = decoder.advance(token, live)


class _Record:
    """What was sampled so far. Rows are numbers of queries."""

    def __init__(
        self,
        queries: Sequence[Sequence[int]],
        limits: Sequence[int],
        uniforms: Sequence[Tensor],
        stop_ids: Sequence[int],
        device: torch.device,
        sampling: Sampling,
        text_of: Callable[[list[int]], str] | None,
    ) -> None:
        count, longest = len(queries), max(limits)
        self.queries = [list(query) for query in queries]
        self.sampling = sampling
        self.text_of = text_of
        self.limits = torch.tensor(list(limits), device=device)
        self.uniforms = torch.stack(
            [row[:longest] if len(row) >= longest else _extend(row, longest) for row in uniforms]
        ).to(device)
        self.stops = torch.tensor(list(stop_ids), device=device)
        self.tokens = torch.zeros(count, longest, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, longest, device=device)
        self.values: Tensor | None = None
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)
        self.by_string = torch.zeros(count, dtype=torch.bool, device=device)

    def draw(self, rows: Tensor, probs: Tensor) -> Tensor:
        """The next token of each row, [n]."""
        at = self.lengths[rows]
        if self.sampling.min_tokens:
            early = at < self.sampling.min_tokens
            probs = probs.clone()
            probs[:, self.stops] = probs[:, self.stops].masked_fill(early[:, None], 0.0)
        return draw(probs, self.uniforms[rows, at], self.sampling)

    def add(self, rows: Tensor, token: Tensor, logprobs: Tensor, values: Tensor | None) -> Tensor:
        """Write one token of each row; whether the row goes on, bool, [n]."""
        at = self.lengths[rows]
        self.tokens[rows, at] = token
        self.logprobs[rows, at] = logprobs
        if values is not None:
            if self.values is None:
                self.values = torch.zeros_like(self.logprobs)
            self.values[rows, at] = values
        self.lengths[rows] = at + 1
        self.stopped[rows] = torch.isin(token, self.stops)
        if self.sampling.stop_strings:
            self._look_for_strings(rows)
        return ~self.stopped[rows] & ~self.by_string[rows] & (at + 1 < self.limits[rows])

    def _look_for_strings(self, rows: Tensor) -> None:
        """Look at the end of each text: a stop string has at most a token per byte."""
        text_of, strings = self.text_of, self.sampling.stop_strings
        assert text_of is not None
        most = max(len(string.encode()) for string in strings) + 1
        ends = self.lengths[rows]
        back = torch.arange(-most, 0, device=rows.device)
        # One copy from a GPU for all rows.
        windows = self.tokens[rows[:, None], (ends[:, None] + back).clamp(min=0)].tolist()
        tails = [
            text_of(window[max(0, most - end) :])
            for window, end in zip(windows, ends.tolist(), strict=True)
        ]
        found = [any(string in tail for string in strings) for tail in tails]
        self.by_string[rows] = torch.tensor(found, device=rows.device)

    def result(self) -> Rollout:
        """What was sampled, row by row."""
        lengths = self.lengths.tolist()
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        values = None if self.values is None else self.values.cpu()
        ends = zip(self.stopped.tolist(), self.by_string.tolist(), strict=True)
        reasons = ["stop" if s else "stop string" if t else "length" for s, t in ends]
        return Rollout(
            queries=self.queries,
            responses=[tokens[row, :length].tolist() for row, length in enumerate(lengths)],
            finished=[reason != "length" for reason in reasons],
            logprobs=[logprobs[row, :length].clone() for row, length in enumerate(lengths)],
            values=None
            if values is None
            else [values[row, :length].clone() for row, length in enumerate(lengths)],
            reasons=reasons,
            altered=self.sampling.alters_distribution,
        )


def _extend(row: Tensor, length: int) -> Tensor:
    """Pad a row of uniforms that is only as long as its own limit."""
    return torch.cat([row, row.new_zeros(length - len(row))])


def draw(probs: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens by inverting the cumulative distribution, [n, V] and [n] -> [n].

    First a block of tokens, then one of the block, so that only `BLOCK` numbers of each row are
    added up one by one. These sums are float64: over many tokens a float32 sum is off by more than
    rare ones weigh. A token's probability is as exact as the float32 sum of its block's.

    Raises:
        TrainingError: a row gives no token a chance.
    """
    if sampling.greedy:
        return probs.argmax(-1)
    weights = _filtered(probs, sampling)
    blocks = functional.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    masses = blocks.sum(-1)
    if bool((~(masses.sum(-1) > 0.0)).any()):  # not a number is not above 0 either
        raise TrainingError(
            "the policy gives no token a chance: its logits are not numbers, or min_tokens forbids "
            "every token that it would say",
            "look at the last metrics for a loss that leapt; a lower learning rate or response."
            "min_tokens 0 helps",
        )
    block, rest = _invert(masses, uniform)
    chosen = blocks[torch.arange(len(probs), device=probs.device), block]
    return block * BLOCK + _invert(chosen, rest)[0]


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where in rows of weights uniform numbers fall, and how far into that weight, in [0, 1).

    The threshold stays below the total, so that the sum passes it, and at a place of some weight.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform * total, below)[:, None]
    place = torch.searchsorted(cumulative, threshold, right=True)
    weight = weights.gather(-1, place).double()
    rest = (threshold - cumulative.gather(-1, place) + weight) / weight
    return place[:, 0], rest[:, 0].clamp(min=0.0)


def _filtered(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after top-k and top-p, not normalised."""
    if sampling.top_k:
        kth = probs.topk(min(sampling.top_k, probs.shape[-1]), dim=-1).values[:, -1:]
        probs = probs * (probs >= kth)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    return probs
