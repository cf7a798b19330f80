"""Supervised fine-tuning and reward modelling on transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from suasion.classic import (
    ArgumentError,
    ConstantLengthDataset,
    DataCollatorForCompletionOnlyLM,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)
from suasion.core.errors import DataError

from .conftest import FAMILIES, LINES, tiny

TEXTS = Dataset.from_dict({"text": LINES * 8, "stars": [1] * 8 * len(LINES)})
PAIRS = Dataset.from_dict(
    {"chosen": ["good cat", "good dog ran"] * 16, "rejected": ["bad cat", "bad dog ran"] * 16}
)


@pytest.fixture(autouse=True)
def _no_pin_memory() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    """A short run without reports."""
    settings = {
        "max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8,
        "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return kind(output_dir=str(folder), **settings)


def losses(trainer: Any) -> list[float]:
    """Losses by step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def classifier(tokenizer: PreTrainedTokenizerFast, labels: int = 1) -> Any:
    """A tiny scorer."""
    torch.manual_seed(0)
    config = FAMILIES["gpt2"](tokenizer)
    assert isinstance(config, GPT2Config)
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("how", ["field", "function", "packed", "stream", "completion"])
def test_fine_tuning_lowers_the_loss(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, how: str
) -> None:
    """From a column, a function, packed, as a stream, on completions."""
    options: dict[str, Any] = {
        "field": {"dataset_text_field": "text", "max_seq_length": 16, "tokenizer": tokenizer},
        "function": {
            "formatting_func": lambda rows: [f"{text}!" for text in rows["text"]],
            "processing_class": tokenizer,
        },
        "packed": {
            "dataset_text_field": "text", "packing": True, "max_seq_length": 16,
            "tokenizer": tokenizer,
        },
        "stream": {"packing": True, "tokenizer": tokenizer},
        "completion": {
            "dataset_text_field": "text",
            "tokenizer": tokenizer,
            "data_collator": DataCollatorForCompletionOnlyLM(
                tokenizer("the")["input_ids"][:1], tokenizer=tokenizer
            ),
        },
    }[how]  # fmt: skip
    rows: Any = TEXTS
    if how == "stream":
        rows = ConstantLengthDataset(tokenizer, TEXTS, "text", infinite=True, seq_length=16)
    if how == "completion":
        rows = TEXTS.filter(lambda row: row["text"].startswith("the"))
    trainer = SFTTrainer(
        tiny(tokenizer, "llama"), arguments(tmp_path), train_dataset=rows, **options
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.6 * found[0]


def test_fine_tuning_by_name_with_adapters_and_evaluation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Only the adapter trains."""
    tiny(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = SFTTrainer(
        str(tmp_path / "base"),
        arguments(tmp_path, max_steps=1),
        train_dataset=TEXTS,
        eval_dataset=TEXTS,
        dataset_text_field="text",
        peft_config=LoraConfig(r=2, target_modules=["c_attn"]),
    )
    trainer.train()
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        n for n, _ in trainer.model.named_parameters() if "lora" in n
    }
    assert trainer.evaluate()["eval_loss"] > 0


def test_fine_tuning_that_cannot_be(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The message says which argument is wrong."""

    def build(**options: Any) -> SFTTrainer:
        settings = {"tokenizer": tokenizer, "train_dataset": TEXTS, **options}
        return SFTTrainer(tiny(tokenizer), arguments(tmp_path), **settings)

    with pytest.raises(ArgumentError, match="which of text, stars is the text"):
        build()
    with pytest.raises(ArgumentError, match="no column 'txt'"):
        build(dataset_text_field="txt")
    with pytest.raises(ArgumentError, match="packing=False"):
        build(packing=True, data_collator=DataCollatorForCompletionOnlyLM([5], tokenizer=tokenizer))
    with pytest.raises(ArgumentError, match="returned a str"):
        build(formatting_func=lambda _: "text")
    with pytest.raises(DataError, match="do not fill one block of 9999"):
        build(packing=True, dataset_text_field="text", max_seq_length=9999)
    with pytest.raises(ArgumentError, match="two names of one argument"):
        build(processing_class=object())
    with pytest.raises(ArgumentError, match="model given by name"):
        build(dataset_text_field="text", model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ArgumentError, match="no folder to load one from"):
        SFTTrainer(tiny(tokenizer), arguments(tmp_path), train_dataset=TEXTS)


def columns(tokenizer: PreTrainedTokenizerFast, chosen: str, rejected: str) -> Dataset:
    """The pairs as tokens, under the given endings."""
    found: dict[str, Any] = {}
    for half, ending in (("chosen", chosen), ("rejected", rejected)):
        encoded = tokenizer(list(PAIRS[half]))
        found[f"input_ids_{ending}"] = encoded["input_ids"]
        found[f"attention_mask_{ending}"] = encoded["attention_mask"]
    return Dataset.from_dict(found)


@pytest.mark.parametrize("style", ["text", "chosen", "jk"])
def test_a_reward_model_learns_the_pairs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, style: str
) -> None:
    """From texts and from both styles of token columns."""
    rows = {
        "text": PAIRS,
        "chosen": columns(tokenizer, "chosen", "rejected"),
        "jk": columns(tokenizer, "j", "k"),
    }[style]
    trainer = RewardTrainer(
        classifier(tokenizer),
        arguments(tmp_path, RewardConfig, max_length=16, learning_rate=3e-3),
        train_dataset=rows,
        eval_dataset=rows,
        tokenizer=tokenizer,
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.5 * found[0]
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_centring_margin_and_length(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The loss by hand; pairs that are too long are counted."""
    model = classifier(tokenizer).eval()
    batch = {
        "input_ids_chosen": torch.tensor([[5, 6]]), "attention_mask_chosen": torch.ones(1, 2),
        "input_ids_rejected": torch.tensor([[7, 8]]), "attention_mask_rejected": torch.ones(1, 2),
        "margin": torch.tensor([0.5]),
    }  # fmt: skip
    trainer = RewardTrainer(
        model,
        arguments(tmp_path, RewardConfig, center_rewards_coefficient=0.01, max_length=1),
        tokenizer=tokenizer,
    )
    loss, scores = trainer.compute_loss(model, batch, return_outputs=True)
    c, r = scores["rewards_chosen"].item(), scores["rewards_rejected"].item()
    expected = torch.log1p(torch.exp(torch.tensor(-(c - r - 0.5)))) + 0.01 * (c + r) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.warns(UserWarning, match="32 of 32 pairs are over max_length 1"):
        RewardTrainer(
            model,
            arguments(tmp_path, RewardConfig, max_length=1),
            train_dataset=columns(tokenizer, "j", "k"),
            tokenizer=tokenizer,
        )


def test_reward_models_that_cannot_be(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Two outputs, lost columns, missing columns."""

    def build(model: Any = None, args: Any = None, **options: Any) -> RewardTrainer:
        return RewardTrainer(
            model or classifier(tokenizer),
            args or arguments(tmp_path, RewardConfig),
            tokenizer=tokenizer,
            **options,
        )

    with pytest.raises(ArgumentError, match="gives one score, this one has 2"):
        build(classifier(tokenizer, 2))
    with pytest.raises(ArgumentError, match="throw the pairs away"):
        build(args=arguments(tmp_path))
    with pytest.raises(ArgumentError, match="no column rejected"):
        build(train_dataset=PAIRS.remove_columns("rejected"))
