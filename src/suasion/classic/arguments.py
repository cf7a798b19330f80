"""Arguments that several entry points take alike: tokenizers old and new, adapters."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from suasion.classic.errors import ArgumentError


def one_tokenizer(tokenizer: Any, processing_class: Any, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, under its old name or its new one, else that of the model.

    Raises:
        ArgumentError: two different ones are given, or none can be found.
    """
    if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
        raise ArgumentError(
            "tokenizer and processing_class are two names of one argument", "give one of them"
        )
    found = tokenizer if tokenizer is not None else processing_class
    if found is not None:
        return found
    source = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if not source:
        raise ArgumentError("there is no tokenizer, and the model has no folder to load one from")
    return AutoTokenizer.from_pretrained(source)


def with_adapter(model: Any, peft_config: PeftConfig | None) -> Any:
    """The model with a new adapter, prepared for it where its weights are quantised.

    Raises:
        ArgumentError: it has an adapter already.
    """
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ArgumentError(
            "the model has an adapter already and peft_config asks for another",
            "merge the first one (suasion merge), or leave peft_config out to go on training it",
        )
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model)
    return get_peft_model(model, peft_config)
