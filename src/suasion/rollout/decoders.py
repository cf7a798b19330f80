"""Two ways to run a model token by token; the sampler does not know which it has.

A decoder gives, for every response under way, the hidden state that predicts its next token. It is
told which token was drawn and which responses go on, and gives the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from suasion.functional.autocast import product_dtype
from suasion.models.attention import builds_kernels, run_packed, spare_tokens
from suasion.models.packing import filled_up
from suasion.models.roles import Policy
from suasion.rollout.graphs import KEYS, SHORT, Replayed, recorder, rows_in_steps

ROWS = 4
"""Rows come in multiples of this, where that saves building kernels."""


class Decoder(Protocol):
    """n rows are under way; which query each belongs to changes as responses end."""

    def start(self) -> tuple[Tensor, Tensor]:
        """The first rows: query numbers [n] and hidden states [n, D]."""
        ...

    def advance(self, token: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """After `token` [n] was drawn, of which only rows with `live` [n] go on.

        Returns:
            Query numbers [m] and hidden states [m, D]; m is 0 once all is done.
        """
        ...


class PaddedDecoder:
    """One batch, prompts padded on the left, through the library's own cache: for any model.

    Args:
        policy: Runs.
        queries: Prompt tokens, at least one each.
        pad_id: Fills shorter prompts.
    """

    def __init__(self, policy: Policy, queries: Sequence[Sequence[int]], pad_id: int) -> None:
        self._policy = policy
        self._cache = DynamicCache(config=policy.model.config)
        self._rows = torch.arange(len(queries), device=policy.device)
        longest = max(len(query) for query in queries)
        padded = [[pad_id] * (longest - len(query)) + list(query) for query in queries]
        self._ids = torch.tensor(padded, device=policy.device)
        real = [[False] * (longest - len(query)) + [True] * len(query) for query in queries]
        self._mask = torch.tensor(real, device=policy.device)

    def start(self) -> tuple[Tensor, Tensor]:
        """All rows at once."""
        return self._run(self._ids)

    def advance(self, token: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Drop what ended and run the rest by one token."""
        if not bool(live.all()):
            keep = live.nonzero().squeeze(-1)
            self._rows, self._mask, token = self._rows[keep], self._mask[keep], token[keep]
            if len(keep) == 0:
                return self._rows, token
            self._cache.batch_select_indices(keep)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)
        return self._run(token[:, None])

    def _run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self._policy(ids, self._mask, past_key_values=self._cache, use_cache=True)
        return self._rows, out.last_hidden_state[:, -1]


class SlotDecoder:
    """Every response in a slot of its own; a slot that falls free is taken by a waiting prompt.

    Prompts run side by side without padding, and no key is ever moved but to close a gap. Equal
    prompts are run once. Prompts wait longest first, so that what starts late is short.

    Args:
        policy: Runs; its attention must take packed sequences (`policy.packs`).
        queries: Prompt tokens, at least one each.
        limits: Longest response of each, tokens.
        slots: Responses under way at the same time.
    """

    def __init__(
        self, policy: Policy, queries: Sequence[Sequence[int]], limits: Sequence[int], slots: int
    ) -> None:
        self._policy = policy
        self._queries = queries
        self._slots = min(slots, len(queries))
        self._waiting = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        room = max(len(query) + limit for query, limit in zip(queries, limits, strict=True))
        record = recorder(policy.device) if max(limits) > SHORT else None
        self._multiple = ROWS if builds_kernels() else 1
        self._cache = SlotCache(
            self._slots + -self._slots % self._multiple,
            room if record is None else room + -room % KEYS,
        )
        # Of no method: what refers to itself keeps its memory until Python looks for such things.
        self._step = partial(_step, policy, self._cache)
        self._replayed = None if record is None else Replayed(self._step, record)
        self._rows = torch.empty(0, dtype=torch.long, device=policy.device)
        self._lengths: list[int] = []  # tokens in each slot; reading them does not wait for a GPU

    def start(self) -> tuple[Tensor, Tensor]:
        """As many prompts as there are slots."""
        hidden = self._admit()
        return self._rows, hidden

    def advance(self, token: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Close gaps, run what goes on, and let waiting prompts in once a quarter is free."""
        goes_on = live.tolist()
        if not all(goes_on):
            token = self._close_gaps(token, goes_on)
        hidden = self._decode(token) if len(token) else None
        free = self._slots - len(self._rows)
        if self._waiting and (4 * free >= self._slots or hidden is None):
            fresh = self._admit()
            hidden = fresh if hidden is None else torch.cat([hidden, fresh.to(hidden.dtype)])
        return self._rows, token if hidden is None else hidden

    def _admit(self) -> Tensor:
        """Fill the free slots with waiting prompts; their last hidden states, [new, D]."""
        used = len(self._rows)
        count = min(self._slots - used, len(self._waiting))
        new = [self._waiting.pop() for _ in range(count)]
        distinct: dict[tuple[int, ...], int] = {}
        order = [distinct.setdefault(tuple(self._queries[i]), len(distinct)) for i in new]
        tokens = [token for prompt in distinct for token in prompt]
        lengths = [len(prompt) for prompt in distinct]
        spare = spare_tokens(lengths)
        lengths += spare
        device = self._policy.device
        places = filled_up(lengths, order)[0].to(device)
        self._cache.expect_prompts(places, used)
        ids = torch.tensor(tokens + [0] * sum(spare), device=device)
        hidden = run_packed(self._policy.trunk, ids, lengths, self._cache)
        self._lengths += [len(self._queries[query]) for query in new]
        self._rows = torch.cat([self._rows, torch.tensor(new, device=device)])
        return hidden[places[:, -1]]

    def _decode(self, token: Tensor) -> Tensor:
        count, keys = len(token), max(self._lengths) + 1
        # Rows that nobody reads, in free slots: kernels are built for every number of rows.
        rows = count + -count % self._multiple
        if self._replayed is not None:
            rows, keys = rows_in_steps(count, self._slots), keys + -keys % KEYS
        spare = rows - count
        at = torch.tensor(self._lengths + [0] * spare, device=token.device)
        token = functional.pad(token, (0, spare))
        hidden = (self._replayed or self._step)(token, at, keys)
        self._lengths = [length + 1 for length in self._lengths]
        return hidden[:count]

    def _close_gaps(self, token: Tensor, live: list[bool]) -> Tensor:
        """Move the last live slots into those that ended, so that live ones come first."""
        count = sum(live)
        holes = [slot for slot in range(count) if not live[slot]]
        movers = [slot for slot in range(count, len(live)) if live[slot]]
        if holes:
            for hole, mover in zip(holes, movers, strict=True):
                self._lengths[hole] = self._lengths[mover]
            longest = max(self._lengths[hole] for hole in holes)
            source, target = (torch.tensor(x, device=token.device) for x in (movers, holes))
            self._cache.move(source, target, longest)
            for row in (self._rows, token):
                row[target] = row[source]
        self._rows, self._lengths = self._rows[:count], self._lengths[:count]
        return token[:count]


def _step(policy: Policy, cache: SlotCache, token: Tensor, at: Tensor, keys: int) -> Tensor:
    """Run one token of each of the first slots, which look at `keys` places at most."""
    cache.expect_tokens(at, keys)
    dtype = product_dtype(at.device, policy.trunk.dtype)
    unseen = torch.arange(keys, device=at.device) > at[:, None]
    # Added to the scores; of a mask of bools, each layer would make this again.
    mask = torch.zeros(unseen.shape, dtype=dtype, device=at.device)
    mask.masked_fill_(unseen, -torch.inf)
    out = policy.trunk(
        input_ids=token[:, None],
        position_ids=at[:, None],
        attention_mask=mask[:, None, None],
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = out.last_hidden_state[:, -1]
    return hidden


class SlotCache:
    """Keys and values of each slot, in buffers made once.

    It stands where transformers expects a cache: attention layers hand their new keys and values to
    `update` and attend to what it returns. What they belong to is said before each forward pass.

    Args:
        slots: Sequences held at the same time.
        room: Longest sequence, tokens.
    """

    def __init__(self, slots: int, room: int) -> None:
        self._slots = slots
        self._room = room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts: tuple[Tensor, slice] | None = None
        self._at = torch.empty(0)
        self._every = torch.empty(0)
        self._longest = 0

    def expect_prompts(self, places: Tensor, first: int) -> None:
        """The next pass runs whole prompts side by side.

        Args:
            places: For each slot from `first` on, where its prompt's tokens are, [n, longest]; what
                is filled in behind a prompt's end is never looked at.
            first: Slot.
        """
        self._prompts = (places, slice(first, first + len(places)))

    def expect_tokens(self, at: Tensor, longest: int) -> None:
        """The next pass runs one token for each of the first slots, at positions `at` [n]."""
        self._prompts, self._at, self._longest = None, at, longest
        self._every = torch.arange(len(at), device=at.device)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; all that its queries may look at."""
        # Under autocast keys may come in float32, rotated; attention would round all of them anew.
        key = key.to(value.dtype)
        if layer not in self._layers:
            shape = (self._slots, key.shape[1], self._room, key.shape[3])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        stored = self._layers[layer]
        if self._prompts is not None:
            places, slots = self._prompts
            for into, new in zip(stored, (key, value), strict=True):
                each = new[0].index_select(1, places.flatten()).unflatten(1, places.shape)
                into[slots, :, : places.shape[1]] = each.transpose(0, 1)
            return key, value
        for into, new in zip(stored, (key, value), strict=True):
            into[self._every, :, self._at] = new[:, :, 0]
        count = len(self._at)
        return stored[0][:count, :, : self._longest], stored[1][:count, :, : self._longest]

    def move(self, source: Tensor, target: Tensor, longest: int) -> None:
        """Copy the first `longest` tokens of slots to other slots."""
        for stored in self._layers.values():
            for tensor in stored:
                tensor[target, :, :longest] = tensor[source, :, :longest]

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked by models that count positions from it; ours are always given."""
        return 0
