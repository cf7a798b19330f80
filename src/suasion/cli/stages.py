"""Running one stage: skip it, continue it, or start it; then seal its folder with a manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from suasion.config.schema import (
    EvaluateConfig,
    MergeConfig,
    PpoConfig,
    PrepareConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.errors import ConfigError, SuasionError
from suasion.core.manifest import (
    Manifest,
    abandon,
    alone_in,
    begin,
    changed_keys,
    claim,
    complete,
    finished,
    flat,
    take_back,
)
from suasion.core.ranks import ALONE, Ranks

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
    config: PretrainConfig, folder: Path, *, seed: int, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """Raw text."""
    from suasion.trainers.pretrain import pretrain as body

    return body(config, folder, seed=seed, console=console, ranks=ranks)


def sft(
    config: SftConfig, folder: Path, *, seed: int, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """Questions and answers."""
    from suasion.trainers.sft import sft as body

    return body(config, folder, seed=seed, console=console, ranks=ranks)


def reward(
    config: RewardConfig, folder: Path, *, seed: int, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """Preferences, then the model's card on held-out pairs."""
    from suasion.data.sources import Source
    from suasion.evaluate.reward_card import held_out_pairs, reward_card
    from suasion.rollout.rewards import RewardModel, load_reward
    from suasion.trainers.reward import reward as body

    result = body(config, folder, seed=seed, console=console, ranks=ranks)
    source = Source(Path(str(config.data)))
    if not source.prepared or not ranks.first:
        return result
    judge = load_reward(str(folder / "model"), config.template)
    assert isinstance(judge.reward, RewardModel)
    pairs = held_out_pairs(source, config.evaluation_pairs)
    limit = min(config.max_length or judge.reward.context, judge.reward.context)
    card = reward_card(judge, pairs, level=0.95, max_length=limit)
    return {**result, **card.as_dict()}


def ppo(
    config: PpoConfig, folder: Path, *, seed: int, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """The policy."""
    from suasion.cli.build import ppo as body

    return body(config, folder, seed=seed, console=console, ranks=ranks)


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
        ("before", "after", "start", "perplexity_of", "reward", "gold", "data"),
    ),
}
"""Each stage's body, and which of its options name inputs."""
TOGETHER = ("pretrain", "sft", "reward", "ppo")
"""Stages that all processes run; of the others the first one does all, and the rest wait."""


def run_stage(
    stage: str,
    config: Any,
    folder: Path,
    *,
    seed: int,
    console: Console,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run a stage unless its folder says it is done.

    Args:
        stage: Its name.
        config: Its options.
        folder: Where it writes.
        seed: Root seed.
        console: For progress; should be silent in all processes but the first.
        ranks: The processes that run it. The first one looks after the folder and its manifest.

    Returns:
        Its manifest.

    Raises:
        SuasionError: whatever stopped it; a folder it had written nothing to is not left behind.
    """
    body, input_names = BODIES[stage]
    values = asdict(config)
    inputs = {name: values[name] for name in input_names}

    decided = {key: value for key, value in values.items() if key not in inputs}
    _agree_on(stage, flat({**decided, "seed": seed}), ranks)

    with ExitStack() as lock:

        def start() -> tuple[Manifest, dict[str, Any] | None]:
            _keep_apart(stage, inputs, folder)
            with alone_in(folder):
                manifest = begin(stage, values, inputs, seed)
                stored = _claimed(stage, manifest, folder, console)
            if stored is None:
                lock.enter_context(alone_in(folder))  # by now perhaps a new one of that name
            return manifest, stored

        manifest, stored = ranks.share(start)
        if stored is not None:
            return stored
        work = partial(body, config, folder, seed=seed, console=console)
        began = time.perf_counter()
        try:
            result = work(ranks=ranks) if stage in TOGETHER else ranks.share(work)
        except SuasionError:
            if ranks.first:
                abandon(folder)
            raise
        seconds = time.perf_counter() - began
        ranks.barrier()  # nobody reads a checkpoint any more, which are about to go
        stored = ranks.share(lambda: complete(folder, manifest, result, seconds))
    console.print(f"  done in {seconds:.1f} s: {_brief(stored)}", highlight=False, markup=False)
    return stored


def _claimed(
    stage: str, manifest: Manifest, folder: Path, console: Console
) -> dict[str, Any] | None:
    """What is stored of a finished stage; None if it is to run, and the folder is then ready."""

    def say(what: str) -> None:
        console.print(f"[bold]{stage}[/]  {escape(what)}", highlight=False)

    take_back(folder, manifest)
    stored = finished(folder, manifest)
    if stored is not None:
        say(f"already done, unchanged: {folder}")
        return stored
    changes = changed_keys(folder, manifest)
    if changes:
        say(f"running again: {'; '.join(changes)}")
    say("continuing" if claim(folder, manifest) else "running")
    return None


def _agree_on(stage: str, options: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse processes that were given different options.

    Raises:
        ConfigError: they were; the same message in each of them.
    """
    first, *others = ranks.gather(options)
    for rank, other in enumerate(others, start=1):
        key = next((k for k in (*first, *other) if first.get(k) != other.get(k)), None)
        if key is not None:
            raise ConfigError(
                f"{stage}.{key} is {first.get(key)} in process 0 and {other.get(key)} in process "
                f"{rank}",
                "start all processes with the same recipe and options",
            )


def _keep_apart(stage: str, inputs: Mapping[str, str | None], folder: Path) -> None:
    """Refuse to write over an input, or into one: its contents decide whether a stage is done."""
    target = folder.resolve()
    for name, source in inputs.items():
        if not source or not Path(source).exists():
            continue
        path = Path(source).resolve()
        if path.is_relative_to(target) or target.is_relative_to(path):
            raise ConfigError(
                f"{stage}.{name} is {source}, which shares files with the output folder {folder}",
                "choose another --out folder",
            )


def _brief(stored: dict[str, Any]) -> str:
    figures = {**stored.get("counts", {}), **stored["result"]}
    shown = []
    for name, value in figures.items():
        if isinstance(value, bool | str) or value is None or isinstance(value, dict | list):
            continue
        shown.append(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}")
    return ", ".join(shown)
