"""Supervised fine-tuning on transformers' Trainer, from a column of text or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
from peft import PeftConfig
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments

from suasion.classic.arguments import one_tokenizer, with_adapter
from suasion.classic.collators import DataCollatorForCompletionOnlyLM, TextCollator
from suasion.classic.errors import ArgumentError
from suasion.classic.packing import ConstantLengthDataset
from suasion.core.errors import DataError

_LONGEST = 1024
"""Default of `max_seq_length`, where the tokenizer's own limit is not lower."""


class SFTTrainer(Trainer):
    """A Trainer that tokenises, packs and puts adapters on by itself.

    Args:
        model: A model, or the folder or Hub name of one.
        args: transformers' own.
        data_collator: Rows to a batch; None: every token is a label.
        train_dataset: Rows with text, rows with `input_ids`, or a `ConstantLengthDataset`.
        eval_dataset: The same, or several by name.
        tokenizer: The model's; `processing_class` is its newer name.
        peft_config: Put this adapter on the model.
        dataset_text_field: Column of the text.
        packing: Join texts with EOS and cut them into blocks of `max_seq_length`.
        formatting_func: Makes the text of a row; without packing it is given a batch of rows, as
            columns, and returns a list of texts.
        max_seq_length: Tokens per text or block; None: the tokenizer's limit, at most 1024.
        num_of_sequences: Blocks packed at a time.
        chars_per_token: See `ConstantLengthDataset`.
        dataset_num_proc: Processes that tokenise.
        dataset_batch_size: Rows tokenised at a time.
        model_init_kwargs: For loading a model by name.
        processing_class: See `tokenizer`.
        kwargs: For transformers' Trainer.

    Raises:
        ArgumentError: arguments contradict each other or do not say where the text is.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        dataset_text_field: str | None = None,
        packing: bool = False,
        formatting_func: Callable[[Any], Any] | None = None,
        max_seq_length: int | None = None,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        dataset_num_proc: int | None = None,
        dataset_batch_size: int = 1000,
        model_init_kwargs: dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or TrainingArguments(output_dir="tmp_trainer")
        found = one_tokenizer(tokenizer, processing_class, model)
        if packing and isinstance(data_collator, DataCollatorForCompletionOnlyLM):
            raise ArgumentError(
                "packed blocks begin anywhere, so a loss on completions only cannot be found in "
                "them",
                "set packing=False",
            )
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(model_init_kwargs or {}))
        elif model_init_kwargs:
            raise ArgumentError("model_init_kwargs is for a model given by name")
        prepare = _Preparation(
            found,
            dataset_text_field,
            formatting_func,
            packing=packing,
            length=max_seq_length or min(found.model_max_length, _LONGEST),
            num_of_sequences=num_of_sequences,
            chars_per_token=chars_per_token,
            processes=dataset_num_proc,
            batch_size=dataset_batch_size,
            seed=args.seed,
        )
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset)
        super().__init__(
            model=with_adapter(model, peft_config),
            args=args,
            data_collator=data_collator or TextCollator(found),
            train_dataset=None if train_dataset is None else prepare(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=found,
            **kwargs,
        )


class _Preparation:
    """Turns what a script has into rows of tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_field: str | None,
        formatting_func: Callable[[Any], Any] | None,
        *,
        packing: bool,
        length: int,
        num_of_sequences: int,
        chars_per_token: float,
        processes: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.formatting_func = formatting_func
        self.packing = packing
        self.length = length
        self.num_of_sequences = num_of_sequences
        self.chars_per_token = chars_per_token
        self.processes = processes
        self.batch_size = batch_size
        self.seed = seed

    def __call__(self, dataset: Any) -> Any:
        """Rows ready for the collator."""
        ready = not isinstance(dataset, datasets.Dataset) or "input_ids" in dataset.column_names
        if isinstance(dataset, IterableDataset) or ready:
            return dataset
        if self.text_field is None and self.formatting_func is None:
            raise ArgumentError(
                f"SFTTrainer does not know which of {', '.join(dataset.column_names)} is the text",
                "give dataset_text_field or formatting_func",
            )
        if self.text_field is not None and self.text_field not in dataset.column_names:
            raise ArgumentError(
                f"the dataset has no column {self.text_field!r}",
                f"its columns are {', '.join(dataset.column_names)}",
            )
        return self._packed(dataset) if self.packing else self._tokenised(dataset)

    def _packed(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Blocks; all of them are made before training begins."""
        stream = ConstantLengthDataset(
            self.tokenizer,
            dataset,
            dataset_text_field=self.text_field,
            formatting_func=self.formatting_func,
            seq_length=self.length,
            num_of_sequences=self.num_of_sequences,
            chars_per_token=self.chars_per_token,
            seed=self.seed,
        )
        blocks = [row["input_ids"].tolist() for row in stream]
        if not blocks:
            raise DataError(
                f"the texts do not fill one block of {self.length} tokens",
                "give more text or a smaller max_seq_length",
            )
        return datasets.Dataset.from_dict({"input_ids": blocks})

    def _tokenised(self, dataset: datasets.Dataset) -> datasets.Dataset:
        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            texts = rows[self.text_field] if self.text_field else self._formatted(rows)
            ids = self.tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
            return {"input_ids": ids}

        return dataset.map(
            encode,
            batched=True,
            batch_size=self.batch_size,
            num_proc=self.processes,
            remove_columns=dataset.column_names,
        )

    def _formatted(self, rows: dict[str, list[Any]]) -> list[str]:
        assert self.formatting_func is not None
        texts = self.formatting_func(rows)
        if not isinstance(texts, list):
            raise ArgumentError(
                f"formatting_func returned a {type(texts).__name__} for a batch of rows",
                "without packing it gets columns, and must return a list of texts",
            )
        return texts
