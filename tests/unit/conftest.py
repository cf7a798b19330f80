"""Models so small that building them costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from suasion.config.schema import QUESTION_ANSWER
from suasion.data.codec import Codec, Template
from suasion.models.load import fresh_causal_lm, save_model, train_tokenizer
from suasion.models.roles import Policy

FAMILIES = ("gpt2", "llama", "gpt_neox", "opt", "bloom", "qwen2", "gpt_neo")
VOCABULARY = 300

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": 64,
    },
}


def tiny_config(family: str) -> Any:
    """A configuration of two layers; token 1 ends texts, token 0 pads."""
    special = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    return AutoConfig.for_model(family, vocab_size=VOCABULARY, **special, **SHAPES[family])


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random causal LM whose logits differ enough to have likely and unlikely tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def policies() -> Callable[[str], Policy]:
    """A policy of each family, built once; not to be changed."""
    built: dict[str, Policy] = {}

    def of(family: str) -> Policy:
        if family not in built:
            built[family] = Policy(tiny_model(family), 1.0)
        return built[family]

    return of


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with separate EOS (0) and padding (1) tokens."""
    return train_tokenizer(["Question: how long?\n\nAnswer: not long at all, not long."], 290)


@pytest.fixture(scope="session")
def codec(tokenizer: PreTrainedTokenizerFast) -> Codec:
    """That tokenizer with the usual template."""
    return Codec(tokenizer, Template.parse(QUESTION_ANSWER), (0,), 1)


@pytest.fixture(scope="session")
def model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved tiny llama with its tokenizer; not to be written to."""
    model = fresh_causal_lm(
        family="llama", tokenizer=tokenizer, context=64, hidden_size=32, layers=2, heads=2, seed=3
    )
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, model, tokenizer, QUESTION_ANSWER)
    return folder
