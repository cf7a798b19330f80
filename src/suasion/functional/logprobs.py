"""Log-probabilities and entropies of tokens, from logits or straight from hidden states.

Logits are divided by the sampling temperature in policy, reference and update alike, or ratio and
KL speak of another distribution than the one that was sampled (vwxyzjn/
summarize_from_feedback_details@ee77a9ab summarize_from_feedback_details/ppo.py). Half-precision
inputs are softmaxed in float32; all results are in nats.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from suasion.functional.autocast import product_dtype

_HALF = (torch.bfloat16, torch.float16)
ADDED = 1 << 20
"""Numbers that are added to a sum at a time."""


def token_logprobs(
    logits: Float[Tensor, "*shape V"], tokens: Int[Tensor, "*shape"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Log-probability of each token, `log_softmax(logits / temperature)[token]`.

    Args:
        logits: Scores over the vocabulary at the position that predicts each token.
        tokens: The tokens, already shifted to the positions that predict them.
        temperature: The sampling temperature.

    Returns:
        Log-probabilities in nats, float32 or wider.

    Raises:
        ValueError: The temperature is not positive.
    """
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy_from_logits(
    logits: Float[Tensor, "*shape V"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Exact entropy of the tempered distribution, `-sum_v p_v log p_v`.

    A logit of minus infinity (a forbidden token) adds nothing.

    Args:
        logits: Scores over the vocabulary.
        temperature: The sampling temperature.

    Returns:
        Entropies in nats, float32 or wider.

    Raises:
        ValueError: The temperature is not positive.
    """
    logp = torch.log_softmax(_scaled(logits, temperature), dim=-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def linear_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    temperature: float = 1.0,
    *,
    chunk: int = 512,
    with_entropy: bool = False,
    keep: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Token log-probabilities from the hidden states in front of an output head.

    Equal to `token_logprobs(hidden @ weight.T + bias, tokens, temperature)`, but the logits exist
    for `chunk` positions at a time, in the forward and, recomputed, in the backward pass: memory
    is `chunk * V` instead of `N * V`. Gradients reach hidden, weight and bias, through the entropy
    too; what needs no gradient costs none. Differentiable once.

    Args:
        hidden: Final hidden states, flattened over batch and time (select the positions that count
            beforehand).
        weight: The output head's weight.
        bias: The output head's bias, if it has one.
        tokens: The token predicted at each position.
        temperature: The sampling temperature.
        chunk: Positions whose logits exist at the same time.
        with_entropy: Also compute the exact entropy at each position.
        keep: Keep the logits for the backward pass instead of computing them again: faster, and
            N * V numbers large.

    Returns:
        Log-probabilities in nats, and entropies in nats or None; float32 or wider.

    Raises:
        ValueError: Temperature or chunk is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dtype = product_dtype(hidden.device, hidden.dtype)
    # Recomputed logits must be bit-equal to the first ones, so the precision is settled here:
    # the backward pass runs outside the caller's autocast region.
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _LinearLogprobs.apply(
            hidden,
            weight,
            bias,
            dtype,
            tokens.long(),
            temperature,
            chunk,
            with_entropy,
            keep,
        )
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    """Chunked linear layer, softmax and selection in one node.

    With z the tempered logits, p = softmax(z) and H the entropy:
    d logp_token / dz = onehot - p, and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        tokens: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,  # noqa: FBT001  autograd functions take positions only
        keep: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # Converted in here, so that the sums of the backward pass need not be converted back.
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        n = hidden.shape[0]
        room = _Room(min(chunk, n), weight)
        logprobs = torch.empty(n, dtype=room.wide, device=hidden.device)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        kept = []
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            logp = room.logp(hidden[part], weight, bias, temperature, keep=keep)
            logprobs[part] = logp.gather(1, tokens[part, None]).squeeze(1)
            if entropy is not None:
                entropy[part] = -torch.exp(logp, out=room.scratch(len(logp))).mul_(logp).sum(1)
            if keep:
                kept.append(logp)
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy, *kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, entropy, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_logprobs is None:
            grad_logprobs = hidden.new_zeros(len(tokens), dtype=_wide(hidden.dtype))
        room = _Room(min(ctx.chunk, len(hidden)), weight)
        # Sums over many chunks lose too much in half precision.
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=room.wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=room.wide) if needs_bias else None
        product = torch.empty_like(weight) if needs_weight else None
        for index, start in enumerate(range(0, hidden.shape[0], ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            logp = kept[index] if kept else room.logp(hidden[part], weight, bias, ctx.temperature)
            grad_z = torch.exp(logp, out=room.scratch(len(logp)))
            if grad_entropy is None:
                grad_z.mul_(-grad_logprobs[part, None])
            else:
                slope = (logp + entropy[part, None]).mul_(-grad_entropy[part, None])
                grad_z.mul_(slope.sub_(grad_logprobs[part, None]))
            grad_z.scatter_add_(1, tokens[part, None], grad_logprobs[part, None])
            _temper(grad_z, ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_z.sum(0)
            grad_logits = room.narrow(grad_z)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_rows(grad_weight, torch.mm(grad_logits.T, hidden[part], out=product))
        # The engine casts the wide sums to the dtype of what they are the gradients of.
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


class _Room:
    """Memory for the logits of one chunk after the other; fresh memory costs more than the sums.

    Args:
        rows: Positions of a chunk.
        weight: The output head's weight.
    """

    def __init__(self, rows: int, weight: Tensor) -> None:
        self._shape = (rows, weight.shape[0])
        self._device = weight.device
        self._narrow = weight.dtype
        self.wide = _wide(weight.dtype)
        self._held: dict[str, Tensor] = {}

    def scratch(self, rows: int) -> Tensor:
        """As large as the logits, in float32 or wider; the next `logp` overwrites it."""
        return self._get("scratch", self.wide)[:rows]

    def logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        *,
        keep: bool = False,
    ) -> Tensor:
        """Log-probabilities over the vocabulary; without `keep` they last until the next ones."""
        rows = len(hidden)
        wide = self.scratch(rows)
        logits = wide if self._narrow == self.wide else self._get("logits", self._narrow)[:rows]
        if bias is None:
            torch.mm(hidden, weight.T, out=logits)
        else:
            torch.addmm(bias, hidden, weight.T, out=logits)
        if logits is not wide:
            wide.copy_(logits)
        out = torch.empty_like(wide) if keep else self._get("logp", self.wide)[:rows]
        return torch.log_softmax(_temper(wide, temperature), 1, out=out)

    def narrow(self, chunk: Tensor) -> Tensor:
        """The same numbers in the type of the weight."""
        if self._narrow == self.wide:
            return chunk
        return self._get("logits", self._narrow)[: len(chunk)].copy_(chunk)

    def _get(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._held[name]


def _add_rows(total: Tensor, more: Tensor) -> None:
    """Add to a sum in a wider type; by some rows on a processor, where torch makes wide copies."""
    step = len(more) if more.is_cuda else max(1, ADDED // more.shape[1])
    for into, part in zip(total.split(step), more.split(step), strict=True):
        into += part


def _temper(chunk: Tensor, temperature: float) -> Tensor:
    """Divide in place, where that does anything: it is a pass over a large tensor."""
    return chunk if temperature == 1.0 else chunk.div_(temperature)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return logits.to(_wide(logits.dtype)) / temperature


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype
