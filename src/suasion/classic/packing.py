"""Texts joined by EOS and cut into blocks, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from suasion.classic.errors import ArgumentError
from suasion.core.errors import DataError
from suasion.core.seeding import generator
from suasion.data.packing import pack


class ConstantLengthDataset(IterableDataset[dict[str, Tensor]]):
    """Blocks of `seq_length` tokens cut from concatenated texts.

    Texts are gathered until they have about `seq_length * num_of_sequences` tokens, encoded, ended
    with EOS, and packed by `suasion.data.packing.pack`, which drops the incomplete last block.

    Args:
        tokenizer: Encodes the texts.
        dataset: Rows to iterate over.
        dataset_text_field: Column of the text.
        formatting_func: Makes the text of a row instead.
        infinite: Begin again when the rows are at their end.
        seq_length: Tokens per block.
        num_of_sequences: Blocks gathered at a time.
        chars_per_token: Estimate that turns tokens into characters.
        eos_token_id: Ends each text where the tokenizer has no EOS token; 0 is a token like others.
        shuffle: Shuffle the blocks gathered at a time.
        append_concat_token: End each text with EOS.
        add_special_tokens: Let the tokenizer add its own.
        seed: Of the shuffling.

    Raises:
        ArgumentError: there is neither column nor function, or no EOS token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Iterable[Any],
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,  # noqa: FBT001, FBT002 (the published signature)
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,  # noqa: FBT001, FBT002 (the same)
        append_concat_token: bool = True,  # noqa: FBT001, FBT002 (the same)
        add_special_tokens: bool = True,  # noqa: FBT001, FBT002 (the same)
        seed: int = 0,
    ) -> None:
        if formatting_func is None and dataset_text_field is None:
            raise ArgumentError(
                "ConstantLengthDataset does not know where the text of a row is",
                "give dataset_text_field or formatting_func",
            )
        own = tokenizer.eos_token_id
        self.concat_token_id = eos_token_id if own is None else own
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.seq_length = seq_length
        self.infinite = infinite
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self._seed = seed
        self._text: Callable[[Any], str] = formatting_func or (lambda row: row[dataset_text_field])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for turn, texts in enumerate(self._buffers()):
            blocks = self._blocks(texts)
            order: Iterable[int] = range(len(blocks))
            if self.shuffle:
                drawn = generator(self._seed, "constant-length", turn)
                order = torch.randperm(len(blocks), generator=drawn).tolist()
            for index in order:
                ids = torch.from_numpy(blocks[index].astype(np.int64))
                yield {"input_ids": ids, "labels": ids.clone()}

    def _buffers(self) -> Iterator[list[str]]:
        """Texts of about `max_buffer_size` characters at a time.

        Raises:
            DataError: there is no row at all.
        """
        texts: list[str] = []
        size = 0
        while True:
            empty = True
            for row in self.dataset:
                empty = False
                texts.append(str(self._text(row)))
                size += len(texts[-1])
                if size >= self.max_buffer_size:
                    yield texts
                    texts, size = [], 0
            if empty:
                raise DataError("the dataset to be packed has no row")
            if not self.infinite:
                break
        if texts:
            yield texts

    def _blocks(self, texts: list[str]) -> NDArray[np.int32]:
        """Packed blocks, [count, seq_length]; none where the texts are too short for one."""
        encoded = self.tokenizer(texts, add_special_tokens=self.add_special_tokens)["input_ids"]
        end = [self.concat_token_id] if self.append_concat_token else []
        documents = [[*ids, *end] for ids in encoded]
        if sum(map(len, documents)) < self.seq_length:
            return np.empty((0, self.seq_length), np.int32)
        return pack(documents, self.seq_length)
