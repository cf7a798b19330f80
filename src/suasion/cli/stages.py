"""Running one stage: skip it, continue it, or start it; then seal its folder with a manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from suasion.config.schema import (
    EvaluateConfig,
    MergeConfig,
    PpoConfig,
    PrepareConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.manifest import begin, changed_keys, claim, complete, finished

Body = Callable[..., dict[str, Any]]


def prepare(config: PrepareConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Read a Stack Exchange dump."""
    from suasion.core.progress import Meter
    from suasion.data.stackexchange import prepare_stackexchange, render_examples

    dump = Path(config.dump)
    total = sum(path.stat().st_size for path in dump.glob("*.xml")) if dump.is_dir() else 0
    made = folder / "scratch" / "splits"
    with Meter(console, "prepare", max(total, 1), "byte") as meter:
        counts = prepare_stackexchange(
            dump,
            made,
            site=config.site,
            seed=seed,
            max_pairs=config.max_pairs,
            fractions={
                "supervised": config.supervised,
                "reward": config.reward,
                "policy": config.policy,
                "evaluation": config.evaluation,
            },
            on_progress=lambda done, _: meter.reach(done),
        )
    for split in made.iterdir():
        shutil.rmtree(folder / split.name, ignore_errors=True)
        split.rename(folder / split.name)
    console.print(render_examples(folder), markup=False, highlight=False)
    return {"counts": counts.as_dict()}


def pretrain(
    config: PretrainConfig, folder: Path, *, seed: int, console: Console
) -> dict[str, Any]:
    """Raw text."""
    from suasion.trainers.pretrain import pretrain as body

    return body(config, folder, seed=seed, console=console)


def sft(config: SftConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Questions and answers."""
    from suasion.trainers.sft import sft as body

    return body(config, folder, seed=seed, console=console)


def reward(config: RewardConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Preferences, then the model's card on held-out pairs."""
    from suasion.evaluate.reward_card import held_out_pairs, reward_card
    from suasion.evaluate.run import load_config
    from suasion.data.sources import Source
    from suasion.models.load import context_of
    from suasion.rollout.rewards import load_reward
    from suasion.trainers.reward import reward as body

    result = body(config, folder, seed=seed, console=console)
    source = Source(Path(str(config.data)))
    if not source.prepared:
        return result
    model = str(folder / "model")
    judge = load_reward(model, config.template)
    pairs = held_out_pairs(source, config.evaluation_pairs)
    card = reward_card(
        judge, pairs, level=0.95, max_length=config.max_length or context_of(load_config(model))
    )
    return {**result, **card.as_dict()}


def ppo(config: PpoConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """The policy."""
    from suasion.cli.build import ppo as body

    return body(config, folder, seed=seed, console=console)


def merge(config: MergeConfig, folder: Path, *, seed: int, console: Console) -> dict[str, Any]:
    """Adapter into base."""
    from suasion.trainers.merge import merge as body

    del seed, console
    return body(config, folder)


def evaluate(
    config: EvaluateConfig, folder: Path, *, seed: int, console: Console
) -> dict[str, Any]:
    """What came out."""
    from suasion.evaluate.run import evaluate as body

    return body(config, folder, seed=seed, console=console)


BODIES: dict[str, tuple[Body, tuple[str, ...]]] = {
    "prepare": (prepare, ("dump",)),
    "pretrain": (pretrain, ("text", "model")),
    "sft": (sft, ("model", "data")),
    "reward": (reward, ("model", "data")),
    "ppo": (ppo, ("model", "reward", "data")),
    "merge": (merge, ("model", "data")),
    "evaluate": (
        evaluate,
        ("before", "after", "start", "perplexity_of", "reward", "data"),
    ),
}
"""Each stage's body, and which of its options name inputs."""


def run_stage(
    stage: str, config: Any, folder: Path, *, seed: int, console: Console
) -> dict[str, Any]:
    """Run a stage unless its folder says it is done.

    Returns:
        Its manifest.
    """
    body, inputs = BODIES[stage]
    values = asdict(config)
    manifest = begin(stage, values, {name: values[name] for name in inputs}, seed)
    stored = finished(folder, manifest)
    if stored is not None:
        console.print(f"[bold]{stage}[/]  already done, unchanged: {folder}", highlight=False)
        return stored
    changes = changed_keys(folder, manifest)
    if changes:
        console.print(f"[bold]{stage}[/]  running again: {'; '.join(changes)}", highlight=False)
    continued = claim(folder, manifest)
    console.print(f"[bold]{stage}[/]  {'continuing' if continued else 'running'}", highlight=False)
    began = time.perf_counter()
    result = body(config, folder, seed=seed, console=console)
    seconds = time.perf_counter() - began
    stored = complete(folder, manifest, result, seconds)
    console.print(f"  done in {seconds:.1f} s: {_brief(stored)}", highlight=False)
    return stored


def _brief(stored: dict[str, Any]) -> str:
    figures = {**stored.get("counts", {}), **stored["result"]}
    shown = []
    for name, value in figures.items():
        if isinstance(value, bool | str) or value is None or isinstance(value, dict | list):
            continue
        shown.append(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}")
    return ", ".join(shown)
