"""Sequences side by side in one row, without padding: attention that keeps them apart.

A library model computes everything but attention token by token, so a batch of sequences can be one
long row, and no work is done on padding. The attention here is registered with transformers under
`NAME`; a call without a `packed` argument is the library's own `sdpa`, so a model that uses it
behaves as before everywhere else (generation, padded batches, gradient checkpointing).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from suasion.models.modes import modes_kept
from suasion.models.packing import Batches, batches, one_by_one, together

NAME = "suasion"
"""Of the attention implementation, as in `model.set_attn_implementation(NAME)`."""
STEP = 64
"""Rows of tokens come in multiples of this, where that saves building kernels."""

SPECIAL = ("softcap", "position_bias", "cache")
"""What a model may ask of attention beside the usual."""


@dataclass(frozen=True)
class Packed:
    """Where each sequence of a packed row begins and ends."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; they fill the row."""
    device: torch.device
    """Of the row."""

    @cached_property
    def parts(self) -> Batches:
        """The sequences, sorted into batches once for all layers."""
        return batches(self.lengths, self.device)

    def positions(self) -> Tensor:
        """Position ids of the row, int64, [1, N]: each sequence begins at 0."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None].to(self.device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None
    ) -> Tensor:
        """Causal attention within each sequence.

        Args:
            query: [1, H, N, D].
            key: [1, H, N, D].
            value: [1, H, N, D].
            dropout: Chance of each weight to be left out.
            scale: Of the scores; None for one over the square root of D.

        Returns:
            [1, N, H, D], in the values' type: where positions are rotated in float32, queries and
            keys come in that.
        """
        q, k, v = (x.to(value.dtype)[0].transpose(0, 1) for x in (query, key, value))
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cpu" and not dropout:
                return one_by_one(q, k, v, self.lengths, scale)[None]
            return together(q, k, v, self.parts, dropout_p=dropout, scale=scale)[None]


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Packed | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The library's `sdpa` where nothing is packed, else attention within each sequence."""
    groups = query.shape[1] // key.shape[1]
    if packed is None:
        special = dropout or any(rest.get(name) is not None for name in SPECIAL)
        if groups > 1 and query.shape[2] == 1 and not special:
            return _next_token(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **rest
        )
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return packed.attend(query, key, value, dropout, scaling), None


def _next_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of one token where queries [n, H, 1, D] share the keys [n, h, T, D]; [n, 1, H, D].

    Queries of one key go as if they were tokens of one head. Before 5.23 the library copied all
    keys and values for each of them.
    """
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(len(mask), key.shape[1], -1, mask.shape[-1])
    q = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale)
    return out.reshape(query.shape).transpose(1, 2)


# On GPUs: cuDNN plans its kernels anew for each shape, for tens to hundreds of milliseconds, and
# ours seldom occur twice. With a mask its gradients were not numbers at some lengths in torch 2.11
# to 2.13 (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)  # noqa: FBT003
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def run_packed(trunk: Any, ids: Tensor, lengths: Sequence[int], cache: Any | None = None) -> Tensor:
    """Hidden states of sequences side by side.

    Args:
        trunk: A transformers decoder whose attention implementation is `NAME`.
        ids: Token ids of all sequences, one after the other, [N].
        lengths: Tokens of each, summing to N.
        cache: Receives keys and values.

    Returns:
        [N, D].
    """
    packed = Packed(tuple(lengths), ids.device)
    out = trunk(
        input_ids=ids[None],
        position_ids=packed.positions(),
        # Four axes: the library takes it for a mask already made, and makes none.
        attention_mask=torch.zeros(1, 1, 1, 1, device=ids.device),
        packed=packed,
        use_cache=cache is not None,
        past_key_values=cache,
    )
    return out.last_hidden_state[0]


def builds_kernels() -> bool:
    """Whether matrix products run in kernels that are not torch's default ones.

    These are built anew for every number of rows; rows in steps meet the same ones again.
    """
    return torch.is_autocast_enabled("cpu") or torch.get_float32_matmul_precision() != "highest"


def spare_tokens(lengths: Sequence[int]) -> list[int]:
    """Lengths of sequences to add to a row of such ones, which nobody reads.

    Longer rows come in longer steps, of a thirty-second to a sixteenth of their length. None is
    longer than those there are: a model may have no positions for more.
    """
    count = sum(lengths)
    if not builds_kernels() or count <= STEP:
        return []
    spare, each = -count % max(STEP, 1 << (count // 16).bit_length() - 1), min(STEP, max(lengths))
    return [each] * (spare // each) + [spare % each] * (spare % each > 0)


def can_pack(model: Any, trunk: Any) -> bool:
    """Let `model` use the attention above, if it then computes the same on packed sequences.

    Decided by trying: three sequences together and alone. A model whose attention looks at part of
    the past only (a sliding window), or that takes no such attention, keeps its own. One that has
    ours was tried before.
    """
    config = trunk.config
    before = config._attn_implementation  # noqa: SLF001
    if before == NAME:
        return True
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding" if window else "full_attention"]
    if before != "sdpa" or set(kinds) != {"full_attention"}:
        return False
    same = False
    # What a signature or a shape that does not fit raises:
    with suppress(TypeError, ValueError, RuntimeError):
        model.set_attn_implementation(NAME)
        same = _same_alone(trunk)
    if not same:
        model.set_attn_implementation(before)
    return same


@torch.no_grad()
def _same_alone(trunk: Any) -> bool:
    lengths = (3, 5, 2)
    embedding = trunk.get_input_embeddings().weight
    ids = torch.arange(sum(lengths), device=embedding.device) % len(embedding)
    with modes_kept(trunk):
        trunk.eval()
        together = run_packed(trunk, ids, lengths)
        alone = [
            trunk(input_ids=part[None], attention_mask=torch.ones_like(part)[None], use_cache=False)
            for part in ids.split(lengths)
        ]
    expected = torch.cat([out.last_hidden_state[0] for out in alone])
    if together.dtype in (torch.bfloat16, torch.float16):
        # Other kernels for other shapes round otherwise; what leaked would be as large as the rest.
        return bool((together - expected).float().norm() < 0.03 * expected.float().norm())
    return bool(torch.allclose(together, expected, atol=1e-4, rtol=1e-3))
