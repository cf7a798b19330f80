"""Models, prompts, texts and pairs to measure on: random weights, words that are numbers.

The folders are read by transformers 4.46 and 5.23 alike. The EOS logit is set on its own: one
coordinate of the last hidden state is made nearly constant, only the EOS row of the head reads it,
and how much it reads is searched for until EOS has the chance asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from benchmarks.speed.task import EOS, PAD, SHAPES, TEMPLATE, Task
from suasion.core.files import append_json_line, atomic_folder, write_json

CHANCE = 1 / 50
"""Of EOS at each token."""
CONTEXT = 512
PROMPTS = (8, 64)
"""Fewest and most words of a prompt."""
ANSWERS = (8, 128)
"""Fewest and most words of an answer in texts and pairs."""
COUNTS = {"prompts": 512, "texts": 600, "pairs": 128}
NEVER = -30.0
"""Logit of an EOS that is not to be drawn."""


def prepare(task: Task, root: Path) -> Path:
    """The task's folder, made if it is not there.

    Args:
        task: Says family, shape, vocabulary and whether responses end.
        root: Parent of all such folders.
    """
    folder = task.folder(root)
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as partial:
        config = _config(task)
        policy = _policy(config, CHANCE if task.ending else None)
        _save(policy, partial / "policy", task)
        torch.manual_seed(2)
        judge = AutoModelForSequenceClassification.from_config(_config(task, num_labels=1))
        _save(judge, partial / "reward", task)
        _texts(partial, task.vocabulary_size - 2)
    return folder


def _config(task: Task, **special: Any) -> PretrainedConfig:
    layers, width, heads, _ = SHAPES[task.shape]
    size = task.vocabulary_size
    shared: dict[str, Any] = {
        "vocab_size": size,
        "eos_token_id": size - 2,
        "bos_token_id": size - 2,
        "pad_token_id": size - 1,
        "tie_word_embeddings": True,
        **special,
    }
    if task.family == "gpt2":
        dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(
            n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=heads, **dropout, **shared
        )
    return LlamaConfig(
        max_position_embeddings=CONTEXT,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        **shared,
    )


@torch.no_grad()
def _policy(config: Any, chance: float | None) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    table = model.get_input_embeddings().weight
    table[:, 0] = 1.0  # of every word, so that it changes no logit but through the EOS row
    ids = torch.randint(0, config.vocab_size - 2, (16, 32))

    def mean_chance(row: float) -> float:
        table[config.eos_token_id] = 0.0
        table[config.eos_token_id, 0] = row
        return float(model(input_ids=ids).logits.softmax(-1)[..., config.eos_token_id].mean())

    if chance is None:
        mean_chance(NEVER)
        return model
    low, high = -20.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_chance(middle) < chance else (low, middle)
    return model


def _save(model: Any, folder: Path, task: Task) -> None:
    size = task.vocabulary_size
    if hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig(eos_token_id=size - 2, pad_token_id=size - 1)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(size - 2)} | {EOS: size - 2, PAD: size - 1}
    backend = Tokenizer(WordLevel(words))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([EOS, PAD])
    backend.save(str(folder / "tokenizer.json"))
    # By hand: what version 5 writes, version 4 does not read.
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "pad_token": PAD,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    write_json(folder / "suasion.json", {"template": TEMPLATE})


def _texts(folder: Path, words: int) -> None:
    """Tables of prompts, question-answer texts and pairs."""
    draw = random.Random(3)  # noqa: S311 (not for secrets)

    def some(bounds: tuple[int, int]) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(draw.randint(*bounds)))

    for _ in range(COUNTS["prompts"]):
        append_json_line(folder / "prompts.jsonl", {"query": some(PROMPTS)})
    for _ in range(COUNTS["texts"]):
        row = {"query": some(PROMPTS), "response": some(ANSWERS)}
        append_json_line(folder / "texts.jsonl", row)
    for _ in range(COUNTS["pairs"]):
        row = {"query": some(PROMPTS), "chosen": some(ANSWERS), "rejected": some(ANSWERS)}
        append_json_line(folder / "pairs.jsonl", row)


def table(path: Path) -> list[dict[str, str]]:
    """Rows of one of the tables."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
