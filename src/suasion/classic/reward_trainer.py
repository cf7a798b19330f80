"""Reward modelling on transformers' Trainer, from pairs of texts or of tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments

from suasion.classic.arguments import one_tokenizer, with_adapter
from suasion.classic.collators import RewardDataCollatorWithPadding
from suasion.classic.errors import ArgumentError
from suasion.functional.preference import pairwise_loss
from suasion.functional.statistics import pairwise_accuracy

_LETTERS = {"j": "chosen", "k": "rejected"}
_LONGEST = 512
"""Default of `max_length`."""


@dataclass
class RewardConfig(TrainingArguments):
    """transformers' arguments and those of `RewardTrainer`."""

    max_length: int | None = None
    """Most tokens of a text. Longer texts are cut, longer pairs of tokens are left out."""
    dataset_num_proc: int | None = None
    """Processes that tokenise."""
    center_rewards_coefficient: float | None = None
    """Pull of the scores towards mean zero (arXiv 2312.09244, with 0.01)."""
    remove_unused_columns: bool = False
    """The model knows none of the pairs' columns, so they must stay."""


class RewardTrainer(Trainer):
    """Trains a sequence-classification model with one output to score the chosen text higher.

    Pairs come as text (`chosen`, `rejected`) or as tokens: `input_ids_chosen`,
    `attention_mask_chosen` and so on, or StackLLaMA's `input_ids_j` (chosen) and `input_ids_k`. A
    column `margin` is subtracted from the difference.

    Args:
        model: The model.
        args: `RewardConfig`, or transformers' own with `remove_unused_columns=False`.
        data_collator: Rows to a batch.
        train_dataset: Pairs.
        eval_dataset: Pairs, or several sets by name.
        tokenizer: The model's; `processing_class` is its newer name.
        max_length: Overrides that of the configuration.
        peft_config: Put this adapter on the model.
        processing_class: See `tokenizer`.
        kwargs: For transformers' Trainer.

    Raises:
        ArgumentError: the model has more than one output, or columns would be lost.
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
        max_length: int | None = None,
        peft_config: PeftConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or RewardConfig(output_dir="tmp_trainer")
        if args.remove_unused_columns:
            raise ArgumentError(
                "remove_unused_columns would throw the pairs away: the model knows none of their "
                "columns",
                "set remove_unused_columns=False, or use RewardConfig",
            )
        found = one_tokenizer(tokenizer, processing_class, model)
        _check_model(model, found)
        length = max_length or getattr(args, "max_length", None) or _LONGEST
        processes = getattr(args, "dataset_num_proc", None)
        self.centring = float(getattr(args, "center_rewards_coefficient", None) or 0.0)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: _pairs(rows, found, length, processes) for name, rows in eval_dataset.items()
            }
        else:
            eval_dataset = _pairs(eval_dataset, found, length, processes)
        args.label_names = args.label_names or []
        super().__init__(
            model=with_adapter(model, peft_config),
            args=args,
            data_collator=data_collator or RewardDataCollatorWithPadding(found),
            train_dataset=_pairs(train_dataset, found, length, processes),
            eval_dataset=eval_dataset,
            processing_class=found,
            compute_metrics=kwargs.pop("compute_metrics", None) or compute_accuracy,
            **kwargs,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (the library's signature)
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean pairwise loss; with `return_outputs`, also the scores by half, [B] each."""
        scores = {
            half: model(
                input_ids=inputs[f"input_ids_{half}"],
                attention_mask=inputs[f"attention_mask_{half}"],
            ).logits.squeeze(-1)
            for half in ("chosen", "rejected")
        }
        self.loss_is_scaled_for_ga = False
        loss = pairwise_loss(
            scores["chosen"].float(),
            scores["rejected"].float(),
            margin=inputs.get("margin", 0.0),
            centring=self.centring,
        ).mean()
        found = {f"rewards_{half}": score for half, score in scores.items()}
        return (loss, found) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 (the library's signature)
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, scores [B, 2] (chosen, rejected), and labels: index 0 is the better one."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        both = torch.stack([scores["rewards_chosen"], scores["rewards_rejected"]], dim=1).float()
        return loss.detach(), both, torch.zeros(len(both), device=both.device)


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Part of the pairs ranked as labelled; a tie is a miss.

    Args:
        prediction: Scores [N, 2], chosen first.
    """
    scores = torch.from_numpy(np.asarray(prediction.predictions))
    return {"accuracy": float(pairwise_accuracy(scores[:, 0], scores[:, 1]))}


def _check_model(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "num_labels", 1) != 1:
        raise ArgumentError(
            f"a reward model gives one score, this one has {config.num_labels}",  # type: ignore[union-attr]
            "load it with num_labels=1",
        )
    if config is not None and config.pad_token_id is None:
        # transformers reads the score at the last token that is not this one
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad


def _pairs(dataset: Any, tokenizer: PreTrainedTokenizerBase, length: int, processes: Any) -> Any:
    """Pairs as tokens, under the names of `RewardDataCollatorWithPadding`."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    for letter, half in _LETTERS.items():
        for name in ("input_ids", "attention_mask"):
            if f"{name}_{letter}" in dataset.column_names:
                dataset = dataset.rename_column(f"{name}_{letter}", f"{name}_{half}")
    if "input_ids_chosen" not in dataset.column_names:
        return _tokenised(dataset, tokenizer, length, processes)

    def fits(row: dict[str, Any]) -> bool:
        return max(len(row["input_ids_chosen"]), len(row["input_ids_rejected"])) <= length

    kept = dataset.filter(fits, num_proc=processes)
    if len(kept) < len(dataset):
        warnings.warn(
            f"{len(dataset) - len(kept)} of {len(dataset)} pairs are over max_length {length} "
            "and left out",
            UserWarning,
            stacklevel=3,
        )
    return kept


def _tokenised(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int, processes: Any
) -> datasets.Dataset:
    missing = {"chosen", "rejected"} - set(dataset.column_names)
    if missing:
        raise ArgumentError(
            f"the pairs have no column {' and no column '.join(sorted(missing))}, only "
            f"{', '.join(dataset.column_names)}",
            "give texts in chosen and rejected, or tokens in input_ids_chosen and "
            "input_ids_rejected (or input_ids_j and input_ids_k)",
        )

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        columns = {}
        for half in ("chosen", "rejected"):
            found = tokenizer(rows[half], truncation=True, max_length=length)
            columns[f"input_ids_{half}"] = found["input_ids"]
            columns[f"attention_mask_{half}"] = found["attention_mask"]
        return columns

    return dataset.map(
        encode, batched=True, num_proc=processes, remove_columns=["chosen", "rejected"]
    )
