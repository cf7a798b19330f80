"""Supervised fine-tuning: question-answer texts, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from suasion.config.schema import SftConfig
from suasion.core.errors import DataError
from suasion.core.seeding import seed_of
from suasion.data.packing import pack
from suasion.data.sources import Source, documents, spread
from suasion.models.adapters import add_lora
from suasion.models.likelihood import perplexity
from suasion.models.load import (
    context_of,
    device_for_training,
    load_causal_lm,
    load_codec,
    save_model,
)
from suasion.models.roles import Policy
from suasion.trainers.fit import fit
from suasion.trainers.packed import Blocks, check_block


def sft(config: SftConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Train on packed question-answer texts, all weights or adapters.

    Writes `model/`; with adapters also `adapter/`, and `model/` is then the merged model unless
    `lora.merge` is off.

    Returns:
        Perplexity on the evaluation texts before and after, and token counts.
    """
    assert config.model is not None
    assert config.data is not None
    codec = load_codec(config.model, config.template)
    model: Any = load_causal_lm(config.model)
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
    before = perplexity(Policy(model, 1.0), held_out, pad_id=codec.pad_id)
    outcome = fit(
        model,
        Blocks(blocks),
        Blocks.collate,
        config,
        folder=folder,
        seed=seed,
        console=console,
        title="sft",
    )
    after = perplexity(Policy(model, 1.0), held_out, pad_id=codec.pad_id)
    save_trained(folder, model, codec.tokenizer, config.template, merge=config.lora.merge)
    return {
        "perplexity_before": before,
        "perplexity_after": after,
        "texts": len(rows),
        "tokens": int(blocks.size),
        **outcome,
    }


def save_trained(folder: Path, model: Any, tokenizer: Any, template: str, *, merge: bool) -> None:
    """Write `model/`, and of a model with an adapter also `adapter/`."""
    if not hasattr(model, "peft_config"):
        save_model(folder / "model", model, tokenizer, template)
        return
    save_model(folder / "adapter", model, tokenizer, template)
    if merge:
        model = model.merge_and_unload(safe_merge=True)
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
