"""Blocks of constant length, and collators that know answers by length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from suasion.classic import (
    ArgumentError,
    ConstantLengthDataset,
    DataCollatorForCompletionOnlyLM,
    RewardDataCollatorWithPadding,
)
from suasion.classic.collators import TextCollator
from suasion.core.errors import DataError

from .conftest import LINES

ROWS = [{"text": line} for line in LINES * 4]


def blocks(tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
    """All blocks of the rows."""
    settings = {"dataset_text_field": "text", "seq_length": 8, **options}
    return [row["input_ids"].tolist() for row in ConstantLengthDataset(tokenizer, ROWS, **settings)]


def test_blocks_are_the_texts_joined_by_an_eos_whose_id_is_zero(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Nothing is lost but the tail; shuffling is a permutation, the same each time."""
    assert tokenizer.eos_token_id == 0
    stream = [t for row in ROWS for t in [*tokenizer(row["text"])["input_ids"], 0]]
    found = blocks(tokenizer, shuffle=False)
    assert list(itertools.chain(*found)) == stream[: len(stream) // 8 * 8]
    assert sorted(blocks(tokenizer)) == sorted(found)
    assert blocks(tokenizer) != found
    assert blocks(tokenizer) == blocks(tokenizer)


def test_options_of_the_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    """No EOS, a function instead of a column, small buffers, no end."""
    assert 0 not in itertools.chain(*blocks(tokenizer, append_concat_token=False))
    formatted = blocks(
        tokenizer, dataset_text_field=None, formatting_func=lambda row: row["text"] + "!"
    )
    assert len(formatted) > len(blocks(tokenizer))
    small = blocks(tokenizer, num_of_sequences=2, shuffle=False)
    assert all(len(block) == 8 for block in small)
    stream = ConstantLengthDataset(tokenizer, ROWS, "text", infinite=True, seq_length=8)
    rows = list(itertools.islice(stream, 100))
    assert len(rows) == 100
    assert torch.equal(rows[0]["input_ids"], rows[0]["labels"])


def test_streams_that_cannot_be(tokenizer: PreTrainedTokenizerFast) -> None:
    """No text, no row; texts too short for a block give none."""
    with pytest.raises(ArgumentError, match="where the text of a row is"):
        ConstantLengthDataset(tokenizer, ROWS)
    with pytest.raises(DataError, match="no row"):
        next(iter(ConstantLengthDataset(tokenizer, [], "text", infinite=True)))
    assert blocks(tokenizer, seq_length=4096) == []


def test_every_real_token_is_a_label_even_where_padding_is_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """An EOS in the text counts, padding of the same id would not."""
    collate = TextCollator(tokenizer)
    batch = collate([{"input_ids": [5, 6, 0]}, {"input_ids": [7, 1, 1, 0]}])
    assert batch["labels"].tolist() == [[5, 6, 0, -100], [7, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_loss_on_one_completion_only(tokenizer: PreTrainedTokenizerFast) -> None:
    """What follows the template counts, to the end of the text and not of its padding."""
    collate = DataCollatorForCompletionOnlyLM([8, 9], tokenizer=tokenizer)
    batch = collate([[4, 5, 8, 9, 6, 0], {"input_ids": [8, 9, 3]}])
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, 6, 0],
        [-100, -100, 3, -100, -100, -100],
    ]
    with pytest.warns(UserWarning, match="this text has no loss"):
        assert set(collate([[4, 5]])["labels"].flatten().tolist()) == {-100}


def test_loss_on_all_answers_of_a_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each answer counts up to the next question."""
    collate = DataCollatorForCompletionOnlyLM([9], [8], tokenizer=tokenizer)
    batch = collate([[8, 3, 9, 4, 5, 8, 2, 9, 6]])
    skip = -100
    assert batch["labels"].tolist() == [[skip, skip, skip, 4, 5, skip, skip, skip, 6]]
    with pytest.warns(UserWarning, match="instruction template"):
        collate([[3, 9, 4]])


def test_templates_may_be_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """They are encoded without special tokens."""
    collate = DataCollatorForCompletionOnlyLM(" cat", tokenizer=tokenizer)
    ids = tokenizer("good cat the end")["input_ids"]
    labels = collate([ids])["labels"][0]
    kept = labels[labels != -100].tolist()
    assert tokenizer.decode(kept) == " the end"


def test_completion_collators_that_cannot_be(tokenizer: PreTrainedTokenizerFast) -> None:
    """What is missing or unsupported is said."""
    with pytest.raises(ArgumentError, match="needs tokenizer="):
        DataCollatorForCompletionOnlyLM("x")
    with pytest.raises(ArgumentError, match="no mlm"):
        DataCollatorForCompletionOnlyLM("x", tokenizer=tokenizer, mlm=True)


def test_pairs_are_padded_each_on_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """The two halves have widths of their own."""
    collate = RewardDataCollatorWithPadding(tokenizer, pad_to_multiple_of=4)
    batch = collate(
        [
            {"input_ids_chosen": [5], "input_ids_rejected": [6, 7], "margin": 0.5},
            {"input_ids_chosen": [5, 6, 7, 8, 9], "input_ids_rejected": [6], "margin": 1},
        ]
    )
    assert batch["input_ids_chosen"].shape == (2, 8)
    assert batch["attention_mask_rejected"].sum(1).tolist() == [2, 1]
    assert batch["margin"].tolist() == [0.5, 1.0]
    with pytest.raises(ArgumentError, match="no column input_ids_chosen or input_ids_j"):
        collate([{"input_ids": [5]}])
