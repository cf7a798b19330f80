"""A policy stage small enough for seconds, built and run as `suasion ppo` does it.

Nothing of the library is replaced: a model folder, a table of queries and the import path of a
reward go in, `suasion.cli.build.ppo_parts` and `PpoLoop` do the rest.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from suasion.cli.build import ppo_parts
from suasion.config.schema import PpoConfig
from suasion.core.files import append_json_line
from suasion.data.codec import Codec, Template
from suasion.models.load import fresh_causal_lm, save_model
from suasion.trainers.ppo import PpoLoop

TEMPLATE = "{query} {response}"
BARE: dict[str, Any] = {
    "samples": 0,
    "save_every": 1000,
    "checks": "off",
    "precision": "fp32",
    "track": (),
}
"""Switches of a policy stage that does nothing but learn."""
EOS, PAD = "</s>", "<pad>"

Measure = Callable[[PpoLoop], dict[str, float]]
"""What is measured of the policy as it stands, before the first iteration and after each."""


def word_codec(words: Sequence[str]) -> Codec:
    """One token per word, then EOS, then padding."""
    vocabulary = {word: place for place, word in enumerate([*words, EOS, PAD])}
    backend = Tokenizer(WordLevel(vocabulary))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    return Codec(tokenizer, Template.parse(TEMPLATE), (vocabulary[EOS],), vocabulary[PAD])


def tiny_model(codec: Codec, *, context: int, width: int, layers: int, seed: int) -> Any:
    """A fresh GPT-2 of this shape over the codec's words."""
    return fresh_causal_lm(
        family="gpt2",
        tokenizer=codec.tokenizer,
        context=context,
        hidden_size=width,
        layers=layers,
        heads=2,
        seed=seed,
    )


@contextmanager
def stage_of(
    model: Any, codec: Codec, queries: Sequence[str], config: PpoConfig, *, seed: int
) -> Iterator[PpoLoop]:
    """The loop of a policy stage that starts from `model`, in a folder that vanishes afterwards.

    Args:
        model: What the policy and its reference start from.
        codec: Its tokenizer and template.
        queries: Prompts to learn on.
        config: Everything else; `reward` is the import path of a function, `template` is TEMPLATE.
        seed: Root of every generator.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(folder / "model", model, codec.tokenizer, TEMPLATE)
        for query in queries:
            append_json_line(folder / "queries.jsonl", {"query": query})
        complete = replace(
            config,
            model=str(folder / "model"),
            data=str(folder / "queries.jsonl"),
        )
        (folder / "ppo").mkdir()
        yield PpoLoop(
            ppo_parts(complete, seed=seed),
            complete,
            folder=folder / "ppo",
            seed=seed,
            console=Console(file=io.StringIO()),
            log=lambda *_: None,
        )


def curve_of(loop: PpoLoop, measure: Measure) -> list[dict[str, float]]:
    """Run the loop to its end.

    Returns:
        Row 0 with the measures before the first iteration; then for each iteration its statistics
        and the measures after it.
    """
    rows = [{"step": 0.0, **measure(loop)}]
    loop.log = lambda stats, step: rows.append({"step": float(step), **stats, **measure(loop)})
    loop.run()
    return rows
