"""Rows to batches. What counts is known from lengths, never from the padding token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from suasion.classic.errors import ArgumentError

IGNORED = -100
"""Label of a token without loss."""


class TextCollator:
    """Right-padded batches in which every real token, an EOS too, is a label.

    Args:
        tokenizer: Its padding token fills batches; without one its EOS token does.
        ignore_index: Label of padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ignore_index: int = IGNORED) -> None:
        self.tokenizer = tokenizer
        self.ignore_index = ignore_index

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of `input_ids`, `attention_mask` and `labels`, all [B, T]."""
        rows = [_ids(example) for example in examples]
        ids, mask = padded_rows(rows, fill_of(self.tokenizer))
        labels = ids.masked_fill(mask == 0, self.ignore_index)
        for row, tokens in enumerate(rows):
            for begin, end in self.without_loss(tokens):
                labels[row, begin:end] = self.ignore_index
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def without_loss(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Half-open spans of real tokens that are no labels."""
        del tokens
        return []


class DataCollatorForCompletionOnlyLM(TextCollator):
    """Batches whose loss is on the answers only.

    Args:
        response_template: What stands in front of each answer, text or token ids. Some tokenizers
            encode a text otherwise in context than alone: then give ids.
        instruction_template: What stands in front of each question of a conversation; None where
            a text has one answer, which then reaches to its end.
        mlm: Must be False.
        ignore_index: Label of tokens without loss.
        tokenizer: Encodes the templates and pads.
        padding_free: Not supported.

    Raises:
        ArgumentError: there is no tokenizer, or an option is not supported.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mlm: bool = False,
        ignore_index: int = IGNORED,
        padding_free: bool = False,
    ) -> None:
        if tokenizer is None:
            raise ArgumentError("DataCollatorForCompletionOnlyLM needs tokenizer=")
        if mlm or padding_free:
            raise ArgumentError("DataCollatorForCompletionOnlyLM supports no mlm or padding_free")
        super().__init__(tokenizer, ignore_index)
        self.response_token_ids = self._encoded(response_template)
        self.instruction_token_ids = (
            None if instruction_template is None else self._encoded(instruction_template)
        )

    def without_loss(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Everything but the answers; all of a text in which no answer is found, with a warning."""
        template = self.response_token_ids
        answers = [at + len(template) for at in _occurrences(tokens, template)]
        if not answers:
            return self._nothing_found("response", tokens, template)
        if self.instruction_token_ids is None:
            return [(0, answers[0])]
        questions = _occurrences(tokens, self.instruction_token_ids)
        if not questions:
            return self._nothing_found("instruction", tokens, self.instruction_token_ids)
        spans, silent_from = [], 0
        for answer in answers:
            if answer > silent_from:
                spans.append((silent_from, answer))
            silent_from = next((q for q in questions if q >= answer), len(tokens))
        return [*spans, (silent_from, len(tokens))]

    def _encoded(self, template: str | list[int]) -> list[int]:
        if not isinstance(template, str):
            return list(template)
        return list(self.tokenizer.encode(template, add_special_tokens=False))

    def _nothing_found(
        self, kind: str, tokens: list[int], template: list[int]
    ) -> list[tuple[int, int]]:
        warnings.warn(
            f"the {kind} template {self.tokenizer.decode(template)!r} (tokens {template}) is not "
            f"in {self.tokenizer.decode(tokens)[:200]!r}; this text has no loss. Raise "
            "max_seq_length, or give the template as token ids as they are in context",
            UserWarning,
            stacklevel=2,
        )
        return [(0, len(tokens))]


class RewardDataCollatorWithPadding:
    """Batches of pairs, each half padded on the right.

    Args:
        tokenizer: Its padding token fills batches.
        padding: Accepted for compatibility; batches are padded to their longest row.
        max_length: Accepted for compatibility; rows come cut to length.
        pad_to_multiple_of: Widths are multiples of this.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding: bool | str = True,  # noqa: FBT001, FBT002 (the published signature)
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.padding = padding
        self.max_length = max_length
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of ids and masks of both halves, margins where there are any.

        Raises:
            ArgumentError: a row has neither `input_ids_chosen` nor `input_ids_j`.
        """
        batch: dict[str, Any] = {"return_loss": True}
        for half, letter in (("chosen", "j"), ("rejected", "k")):
            rows = [_half(row, half, letter) for row in features]
            ids, mask = padded_rows(rows, fill_of(self.tokenizer), self.multiple)
            batch[f"input_ids_{half}"], batch[f"attention_mask_{half}"] = ids, mask
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in features])
        return batch


def padded_rows(rows: Sequence[list[int]], fill: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, right-padded, both int64 [B, T]."""
    width = max(len(row) for row in rows)
    width += -width % multiple
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    return ids, mask


def fill_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills batches: the padding token, else EOS, else 0; the mask tells it from text."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _ids(example: Any) -> list[int]:
    return torch.as_tensor(example["input_ids"] if hasattr(example, "keys") else example).tolist()


def _half(row: dict[str, Any], half: str, letter: str) -> list[int]:
    for name in (f"input_ids_{half}", f"input_ids_{letter}"):
        if name in row:
            return _ids(row[name])
    raise ArgumentError(
        f"a pair has no column input_ids_{half} or input_ids_{letter}, only {', '.join(row)}",
        "give input_ids_chosen and input_ids_rejected (or input_ids_j and input_ids_k), and keep "
        "remove_unused_columns=False",
    )


def _occurrences(tokens: list[int], template: list[int]) -> list[int]:
    """Where `template` begins in `tokens`."""
    size = len(template)
    return [at for at in range(len(tokens) - size + 1) if tokens[at : at + size] == template]
