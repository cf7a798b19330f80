"""Supervised fine-tuning: question-answer texts, packed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from suasion.config.schema import LoraConfig, SftConfig
from suasion.core.errors import DataError
from suasion.core.ranks import ALONE, Ranks
from suasion.core.seeding import seed_of
from suasion.data.packing import pack
from suasion.data.sources import Source, documents, spread
from suasion.models.adapters import add_lora, merged
from suasion.models.likelihood import perplexity
from suasion.models.load import (
    context_of,
    device_for_training,
    load_causal_lm,
    load_codec,
    rest_dtype,
    save_model,
)
from suasion.models.quantised import DTYPES, check_held, held_as
from suasion.models.roles import Policy
from suasion.trainers.fit import fit
from suasion.trainers.packed import Blocks, causal_lm_loss, check_block


def sft(
    config: SftConfig,
    folder: Path,
    *,
    seed: int,
    console: Console,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train on packed question-answer texts, all weights or adapters.

    Writes `model/`; with adapters also `adapter/`, and `model/` is then the merged model unless
    `lora.merge` is off.

    Returns:
        Perplexity on the evaluation texts before and after, and token counts.
    """
    assert config.model is not None
    assert config.data is not None
    check_held(config.lora.base, adapters=config.lora.r > 0, where="sft")
    codec = load_codec(config.model, config.template)
    model: Any = load_causal_lm(
        config.model, rest_dtype(config.lora.base, config.precision), held=config.lora.base
    )
    context = context_of(model.config)
    check_block(config.block, context)
    source = Source(Path(config.data))
    rows = source.answers("supervised", best=config.answers == "best")
    held_out = documents(codec, spread(_held_out(source, rows), config.evaluation_rows))
    held_out = [d for d in held_out if len(d) <= context]
    if not held_out:
        raise DataError(f"{config.data}: every held-out text is longer than {context} tokens")
    blocks = pack(_shuffled(documents(codec, rows), seed), config.block)
    if config.lora.r:
        model = add_lora(model, config.lora, seed=seed_of(seed, "adapter"))
    model.to(device_for_training())
    policy = Policy(model, 1.0)
    before = perplexity(policy, held_out, pad_id=codec.pad_id)
    outcome = fit(
        model,
        Blocks(blocks),
        Blocks.collate,
        partial(causal_lm_loss, policy),
        config,
        folder=folder,
        seed=seed,
        console=console,
        title="sft",
        ranks=ranks,
    )
    after = perplexity(policy, held_out, pad_id=codec.pad_id)
    if ranks.first:
        save_trained(folder, model, codec.tokenizer, config.template, config.lora)
    return {
        "perplexity_before": before,
        "perplexity_after": after,
        "texts": len(rows),
        "tokens": int(blocks.size),
        **outcome,
    }


def save_trained(
    folder: Path, model: Any, tokenizer: Any, template: str, config: LoraConfig
) -> None:
    """Write `model/`, and of a model with an adapter also `adapter/`.

    Args:
        folder: The stage's.
        model: With an adapter or without; not to be used afterwards.
        tokenizer: Goes beside it.
        template: Told in the folders.
        config: Whether and how to merge an adapter.
    """
    if not hasattr(model, "peft_config"):
        save_model(folder / "model", model, tokenizer, template)
        return
    save_model(folder / "adapter", model, tokenizer, template)
    if config.merge:
        # What fits the GPU in codes may not fit it in full precision.
        plain = held_as(model) == "fp32"
        model = merged(model if plain else model.to("cpu"), DTYPES[config.merge_dtype])
    save_model(folder / "model", model, tokenizer, template)


def _held_out(source: Source, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluation texts; of a plain table every twentieth row, which then is not trained on."""
    if source.prepared:
        return source.answers("evaluation", best=False)
    kept = rows[::20]
    del rows[::20]
    return kept


def _shuffled(texts: list[list[int]], seed: int) -> list[list[int]]:
    """A fixed order of the texts, so that neighbours in a block are not of one question."""
    import random

    order = list(range(len(texts)))
    random.Random(seed_of(seed, "pack")).shuffle(order)  # noqa: S311 (not for secrets)
    return [texts[index] for index in order]
