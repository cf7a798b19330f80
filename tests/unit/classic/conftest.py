"""Tiny random models of every family, and a tokenizer trained on a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from suasion.models.load import train_tokenizer

LINES = ["the cat sat on the mat", "a dog ran home", "good cat", "bad dog", "the end of it"]
SIZE = 32

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 280 tokens, EOS 0 and padding 1."""
    return train_tokenizer(LINES, 280)


def _shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llama_like(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_shared(tokenizer),
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }


def _dropout(value: float, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, value)


FAMILIES: dict[str, Callable[[PreTrainedTokenizerFast], PretrainedConfig]] = {
    "gpt2": lambda t: GPT2Config(n_embd=SIZE, n_layer=2, n_head=2, n_positions=64, **_shared(t)),
    "gpt_neo": lambda t: GPTNeoConfig(
        hidden_size=SIZE,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        **_dropout(0.1, "embed_dropout", "attention_dropout", "resid_dropout"),
        **_shared(t),
    ),
    "gpt_neox": lambda t: GPTNeoXConfig(
        **_llama_like(t), **_dropout(0.1, "attention_dropout", "hidden_dropout")
    ),
    "bloom": lambda t: BloomConfig(
        hidden_size=SIZE,
        n_layer=2,
        n_head=2,
        **_dropout(0.1, "attention_dropout", "hidden_dropout"),
        **_shared(t),
    ),
    "opt": lambda t: OPTConfig(
        hidden_size=SIZE,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.1,
        **_shared(t),
    ),
    "llama": lambda t: LlamaConfig(**_llama_like(t), attention_dropout=0.1),
    "qwen2": lambda t: Qwen2Config(**_llama_like(t), num_key_value_heads=2, attention_dropout=0.1),
}


def tiny(tokenizer: PreTrainedTokenizerFast, family: str = "gpt2", seed: int = 0) -> Any:
    """A random model whose distributions are not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.eval()


@pytest.fixture
def with_head(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., AutoModelForCausalLMWithValueHead]:
    """Builds a tiny model with a value head."""

    def build(family: str = "gpt2", **options: Any) -> AutoModelForCausalLMWithValueHead:
        plain = tiny(tokenizer, family)
        return AutoModelForCausalLMWithValueHead.from_pretrained(plain, **options)

    return build


@pytest.fixture
def trainer(
    tokenizer: PreTrainedTokenizerFast,
    with_head: Callable[..., AutoModelForCausalLMWithValueHead],
) -> Callable[..., PPOTrainer]:
    """Builds a trainer on a tiny model; keywords go to the configuration, the rest by name."""

    def build(model: Any = None, parts: dict[str, Any] | None = None, **config: Any) -> PPOTrainer:
        settings = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, **config}
        return PPOTrainer(
            PPOConfig(**settings),
            model if model is not None else with_head(),
            tokenizer=tokenizer,
            **(parts or {}),
        )

    return build


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Any:
    """Accelerate keeps its settings per process; a test must not inherit another's."""
    yield
    AcceleratorState._reset_state()  # noqa: SLF001  the only way
    PartialState._reset_state()  # noqa: SLF001  the same


def batch_of(count: int = 4, seed: int = 1) -> tuple[list[Any], list[Any], list[Any]]:
    """Queries, responses and scores of several lengths."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = [(3, 5), (1, 2), (4, 1), (2, 6)] * count
    ids = [
        (torch.randint(2, 270, (q,), generator=drawn), torch.randint(2, 270, (r,), generator=drawn))
        for q, r in sizes[:count]
    ]
    scores = [torch.randn((), generator=drawn) for _ in range(count)]
    return [q for q, _ in ids], [r for _, r in ids], scores
