"""Checks on the reward: is it a function of one text, and the same one it was when it was saved?"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from suasion.core.errors import ModelError, RewardError
from suasion.core.files import read_json
from suasion.models.load import load_codec, load_reward_model, save_model
from suasion.rollout.rewards import RewardModel
from suasion.watch.finding import Finding, does_not_apply
from suasion.watch.subject import Subject

RELATIVE = 1e-2
"""Share of the scores' spread by which the same text may be scored otherwise."""
ABSOLUTE = 1e-5
"""The same for scores without spread, relative to their size: float32 arithmetic in batches."""
CONSTANT = 1e-6
"""Spread relative to size below which scores tell nothing apart."""
SAVED_BYTES = 2 << 30
"""Reward models larger than this are reloaded but not saved once more: it would take minutes."""


def reward(subject: Subject) -> Finding:
    """Scores are finite, repeatable, not all the same, and of one text each.

    The texts are the rollout's responses, its prompts given as responses, and an empty one.
    """
    score = subject.parts.reward
    texts = [*subject.texts, *subject.queries[:2], ""]
    queries = [*subject.queries, *subject.queries[:2], subject.queries[0]]
    try:
        first = score(queries, texts)
        again = score(queries, texts)
        backwards = score(queries[::-1], texts[::-1])[::-1]
        alone = [score([q], [t])[0] for q, t in zip(queries, texts, strict=True)]
    except RewardError as error:
        return Finding(
            "reward",
            ok=False,
            what=error.what,
            likely_cause="the reward does not cope with every text a policy may write",
            fix=error.fix or "return one finite number for every text",
        )
    spread, size = statistics.pstdev(first), max(map(abs, first))
    tolerance = RELATIVE * spread + ABSOLUTE * max(1.0, size)
    off = {
        "repeated": _largest(first, again),
        "other_order": _largest(first, backwards),
        "alone": _largest(first, alone),
    }
    said = {
        "repeated": "the same call gives other scores",
        "other_order": "scores depend on the order of the batch",
        "alone": "scores depend on the other texts in the batch",
    }
    problems = [f"{said[kind]}, by {found:.2g}" for kind, found in off.items() if found > tolerance]
    if spread <= CONSTANT * max(1.0, size):
        problems.append(f"all {len(first)} texts, the empty one too, score {first[0]:.4g}")
    return Finding(
        "reward",
        ok=not problems,
        measured={**off, "spread": spread, "tolerance": tolerance},
        what="; ".join(problems) + f" (spread of the scores {spread:.2g})",
        likely_cause="the score is read at a padding token, dropout is on, results are matched to "
        "texts by position, the head was not trained, or the batch is normalised",
        fix="make the reward a function of one query and one response",
    )


def head(subject: Subject) -> Finding:
    """A reward model's scores are the same after reload, save, and merge of its adapter.

    Compared: the model in use, its folder loaded again, a copy saved and loaded again, the same
    loaded by transformers alone, and the adapter beside it merged into its base.
    """
    folder = Path(subject.reward_source)
    if not folder.is_dir():
        return does_not_apply("head", "the reward is not a model folder")
    codec = load_codec(str(folder), subject.template)
    rows = [
        (codec.prompt_ids(query), codec.judged_ids(text))
        for query, text in zip(subject.queries, subject.texts, strict=True)
    ]
    try:
        model: Any = load_reward_model(str(folder))
        ours = RewardModel(model, codec)
        in_use = subject.parts.reward(subject.queries, subject.texts)
        scores = {"reloaded": ours(subject.queries, subject.texts)}
        by_tokens = ours.score_tokens(rows)
        others = {"transformers": by_transformers(folder, rows)}
        adapter = _adapter_beside(folder)
        if adapter is not None:
            others["merged"] = RewardModel(load_reward_model(str(adapter)), codec).score_tokens(
                rows
            )
        if sum(p.numel() * p.element_size() for p in model.parameters()) <= SAVED_BYTES:
            with tempfile.TemporaryDirectory() as scratch:
                copy = Path(scratch) / "model"
                save_model(copy, model, codec.tokenizer, subject.template)
                others["saved"] = RewardModel(load_reward_model(str(copy)), codec).score_tokens(
                    rows
                )
    except ModelError as error:
        return Finding(
            "head",
            ok=False,
            what=error.what,
            likely_cause="the model was saved without its scoring head",
            fix=error.fix or "train the reward model again and save it with its head",
        )
    off = {name: _largest(in_use, found) for name, found in scores.items()}
    off |= {name: _largest(by_tokens, found) for name, found in others.items()}
    tolerance = RELATIVE * statistics.pstdev(in_use) + ABSOLUTE * max(1.0, *map(abs, in_use))
    wrong = [f"{name} by {found:.2g}" for name, found in off.items() if not found <= tolerance]
    return Finding(
        "head",
        ok=not wrong,
        measured={**off, "tolerance": tolerance},
        what=f"the reward model scores the same texts otherwise: {', '.join(wrong)}",
        likely_cause="the scoring head is not in the adapter or the merged folder (a fresh one is "
        "then drawn at random), the base is another one, or the padding token is not stored",
        fix="train with the head among the saved modules, and set pad_token_id in config.json",
    )


def by_transformers(
    folder: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
    """Scores of the library's own classifier, one text at a time."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        model: Any = load_reward_model(str(folder))
    else:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        return [
            float(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, 0])
            for prompt, answer in rows
        ]


def templates(subject: Subject) -> Finding:
    """Every stage and every model folder has one and the same template."""
    known = {where: text for where, text in subject.templates.items() if text is not None}
    different = set(known.values())
    listed = "; ".join(f"{where} {text!r}" for where, text in known.items())
    return Finding(
        "templates",
        ok=len(different) <= 1,
        measured={
            "different": len(different),
            "known": len(known),
            "unknown": len(subject.templates) - len(known),
        },
        what=f"{len(different)} templates in one run: {listed}",
        likely_cause="a stage or model folder comes from a run with another template",
        fix="set the recipe's template once, and train again what was trained with another",
    )


def label(subject: Subject) -> Finding:
    """A pipeline's score is the logit of the label that was named, for every text."""
    if not subject.reward_source.startswith("pipeline:"):
        return does_not_apply("label", "the reward is not a classification pipeline")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _, name = subject.reward_source.removeprefix("pipeline:").partition("#")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    places = {str(text): int(place) for place, text in model.config.id2label.items()}
    if name not in places:
        return Finding(
            "label",
            ok=False,
            measured={"labels": len(places)},
            what=f"the classifier {folder} has no label {name!r}",
            likely_cause="a misspelled label, or another version of the classifier",
            fix=f"name one of {', '.join(places)}",
        )
    scores = subject.parts.reward(subject.queries, subject.texts)
    expected = []
    for query, text in zip(subject.queries, subject.texts, strict=True):
        inputs = tokenizer(query + text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(model(**inputs).logits[0, places[name]]))
    off = _largest(scores, expected)
    tolerance = RELATIVE * statistics.pstdev(expected) + ABSOLUTE * max(1.0, *map(abs, expected))
    return Finding(
        "label",
        ok=off <= tolerance,
        measured={"largest": off, "tolerance": tolerance},
        what=f"the score is not the logit of {name!r}: it is off by {off:.2g}",
        likely_cause="the label is taken by its position, but pipelines sort labels by their "
        "score; or the score is a probability",
        fix="look the label up by its name and take its logit",
    )


def _largest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _adapter_beside(folder: Path) -> Path | None:
    """The adapter a merged model was made from, if it and its base are still there."""
    adapter = folder.parent / "adapter"
    settings = adapter / "adapter_config.json"
    if adapter == folder or not settings.is_file():
        return None
    base = read_json(settings).get("base_model_name_or_path")
    return adapter if base and Path(base).is_dir() else None
