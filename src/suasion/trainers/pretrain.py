"""Domain pretraining: raw text in blocks, from a given model or from nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from suasion.config.schema import PretrainConfig
from suasion.core.ranks import ALONE, Ranks
from suasion.core.seeding import seed_of
from suasion.data.codec import Codec, Template
from suasion.data.packing import pack
from suasion.data.sources import raw_texts
from suasion.models.likelihood import perplexity
from suasion.models.load import (
    context_of,
    device_for_training,
    fresh_causal_lm,
    load_causal_lm,
    load_codec,
    save_model,
    train_tokenizer,
)
from suasion.models.roles import Policy
from suasion.trainers.fit import fit
from suasion.trainers.packed import Blocks, causal_lm_loss, check_block


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    seed: int,
    console: Console,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a causal LM on raw text.

    Writes `start/` (the model before, when it is a fresh one) and `model/`.

    Returns:
        Perplexity on held-out text before and after, and token counts.
    """
    assert config.text is not None
    template = Template.parse(config.template)
    texts = raw_texts(Path(config.text), lambda q, a: template.prompt(q) + template.response(a))
    source = config.model or str(folder / "start")
    if config.model is None:
        ranks.share(partial(_write_fresh, config, texts, folder / "start", seed))
    codec = load_codec(source, config.template)
    model = load_causal_lm(source)
    check_block(config.block, context_of(model.config))
    documents = [[*_ids(codec, text), codec.stop_ids[0]] for text in texts]
    training, held_out = _split(documents, config.held_out, config.block)
    blocks = pack(training, config.block)
    model.to(device_for_training())  # type: ignore[arg-type]
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
        title="pretrain",
        ranks=ranks,
    )
    after = perplexity(policy, held_out, pad_id=codec.pad_id)
    if ranks.first:
        save_model(folder / "model", model, codec.tokenizer, config.template)
    return {
        "perplexity_before": before,
        "perplexity_after": after,
        "tokens": int(blocks.size),
        "held_out_tokens": sum(map(len, held_out)),
        "parameters": sum(p.numel() for p in model.parameters()),
        **outcome,
    }


def _write_fresh(config: PretrainConfig, texts: list[str], folder: Path, seed: int) -> None:
    """Make the model to start from, unless an earlier call did."""
    if folder.is_dir():
        return
    fresh = config.fresh
    tokenizer = train_tokenizer(texts, fresh.vocabulary)
    model = fresh_causal_lm(
        family=fresh.family,
        tokenizer=tokenizer,
        context=fresh.context,
        hidden_size=fresh.hidden_size,
        layers=fresh.layers,
        heads=fresh.heads,
        seed=seed_of(seed, "fresh model"),
    )
    save_model(folder, model, tokenizer, config.template)


def _ids(codec: Codec, text: str) -> list[int]:
    tokenizer: PreTrainedTokenizerBase = codec.tokenizer
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _split(
    documents: list[list[int]], held_out: float, block: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Keep every n-th document; of a single long one, its end. Held-out text is in blocks."""
    if len(documents) >= 2 / held_out:
        every = round(1 / held_out)
        kept = documents[every - 1 :: every]
        training = [d for i, d in enumerate(documents) if (i + 1) % every]
    else:
        stream = [token for document in documents for token in document]
        cut = round(len(stream) * (1 - held_out))
        training, kept = [stream[:cut]], [stream[cut:]]
    pieces = [d[at : at + block] for d in kept for at in range(0, len(d), block)]
    return training, pieces
