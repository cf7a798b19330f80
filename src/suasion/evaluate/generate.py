"""Answers of one model, printed or written."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from suasion.config.schema import GenerateConfig
from suasion.core.errors import ConfigError
from suasion.core.files import keep_json_lines
from suasion.core.progress import Meter
from suasion.data.sources import Source, fitting
from suasion.evaluate.answering import answer
from suasion.models.load import context_of, device_for_training, load_causal_lm, load_codec
from suasion.models.roles import Policy


def generate(config: GenerateConfig, console: Console) -> None:
    """Answer the prompts of `config`."""
    assert config.model is not None
    codec = load_codec(config.model, config.template)
    model = load_causal_lm(config.model)
    model.to(device_for_training())  # type: ignore[arg-type]
    policy = Policy(model, config.response.temperature)
    if config.prompt is not None:
        queries, where = [config.prompt], "--prompt"
    else:
        source = Source(Path(str(config.data)))
        queries, where = source.queries("evaluation", config.limit), str(config.data)
    room = context_of(model.config) - config.response.max_tokens
    if room < 1:
        raise ConfigError(
            f"response.max_tokens {config.response.max_tokens} leaves no room for a prompt "
            f"in a context of {context_of(model.config)} tokens",
            "shorten the response",
        )
    queries = fitting(queries, codec, room, config.too_long, where)
    with Meter(console, "answering", len(queries), "answer") as meter:
        answers = answer(
            policy,
            codec,
            queries,
            config.response,
            seed=config.seed,
            meter=meter,
            greedy=config.greedy,
        )
    rows = [
        {"query": query, "response": text}
        for query, text in zip(queries, answers.texts, strict=True)
    ]
    if config.out is not None:
        keep_json_lines(Path(config.out), rows)
        console.print(f"{len(rows)} answers -> {config.out}", highlight=False)
        return
    for row in rows:
        if len(rows) > 1:
            console.print(row["query"], style="dim", markup=False, highlight=False)
        console.print(row["response"], markup=False, highlight=False)
