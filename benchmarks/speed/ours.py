"""Our side of a comparison, through the library as a recipe goes: configuration, parts, loop.

python -m benchmarks.speed.ours TASK FOLDER, with the task as JSON and the models' parent folder.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.speed.probe import Probe
from benchmarks.speed.steps import mean_texts, timed_steps
from benchmarks.speed.task import BLOCK, LORA_ALPHA, LORA_RANK, TEMPLATE, Task
from suasion.cli.build import hold_as_computed, ppo_parts
from suasion.config.schema import (
    CriticConfig,
    LoraConfig,
    PpoConfig,
    ResponseConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.memory import reuse_memory
from suasion.models.arithmetic import float32_products
from suasion.trainers import reward, sft
from suasion.trainers.ppo import PpoLoop, PpoParts, roll_out

PHASES = {
    "rollout": ("rollout",),
    "scoring": ("score", "experience"),
    "update": ("optimise",),
}
"""Our phases from the loop's own clock."""
SEED = 1
LEAN: dict[str, Any] = {"micro_batch_tokens": 512}
"""Options that save memory and leave the result as it is."""


def asked(task: Task) -> dict[str, Any]:
    """The option about precision; by itself the library takes the fastest that is exact enough."""
    return {} if task.precision == "default" else {"precision": task.precision}


def policy_parts(task: Task, folder: Path) -> tuple[PpoParts, PpoConfig]:
    """A policy stage on the models of `folder`."""
    config = PpoConfig(
        model=str(folder / "policy"),
        reward=str(folder / "reward"),
        data=str(folder / "prompts.jsonl"),
        template=TEMPLATE,
        steps=task.iterations,
        batch_size=task.batch,
        mini_batch_size=task.batch,
        epochs=task.epochs,
        learning_rate=1e-6,
        response=ResponseConfig(max_tokens=task.response),
        critic=CriticConfig(kind="reward_model" if task.critic == "separate" else "value_head"),
        lora=LoraConfig(r=LORA_RANK if task.lora else 0, alpha=float(LORA_ALPHA), dropout=0.0),
        checks="off",
        samples=0,
        track=(),
        **(LEAN if task.lean else {}),
        **asked(task),
    )
    parts = ppo_parts(config, seed=SEED)
    hold_as_computed(parts)
    return parts, config


def ppo(task: Task, folder: Path, probe: Probe) -> None:
    """Whole iterations of the policy stage."""
    parts, config = policy_parts(task, folder)
    probe.watch(parts.policy.model.get_input_embeddings())
    probe.note = parts.arithmetic.brief
    seen: list[list[str]] = []
    lengths: list[int] = []
    judge = parts.reward.reward

    class Seen:
        """Remembers what the loop asked to have scored."""

        def __call__(self, queries: Any, responses: Any) -> Any:
            seen.append(list(queries))
            return judge(queries, responses)

    parts.reward.reward = Seen()
    original = parts.trainer.optimise

    def optimise(experience: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        lengths[:] = [len(response) for response in experience.responses]
        return original(experience, *arguments, **named)

    parts.trainer.optimise = optimise  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        loop = PpoLoop(
            parts,
            config,
            folder=Path(scratch),
            seed=SEED,
            console=Console(file=io.StringIO()),
            log=lambda *_: None,
        )
        for step in range(task.iterations):
            probe.start()
            with float32_products(parts.arithmetic.training):
                stats = loop.iteration(step)
            spent = {
                phase: sum(stats[f"time/ppo/{name}"] for name in names)
                for phase, names in PHASES.items()
            }
            prompts = [len(parts.codec.prompt_ids(query)) for query in seen[-1]]
            probe.stop(prompts, lengths, spent)


def rollout(task: Task, folder: Path, probe: Probe) -> None:
    """Answers to one batch of prompts, with the log-probabilities and values that come with it."""
    parts, config = policy_parts(task, folder)
    probe.watch(parts.policy.model.get_input_embeddings())
    probe.note = parts.arithmetic.brief
    for step in range(task.iterations):
        start = step * task.batch
        queries = parts.queries[start : start + task.batch]
        probe.start()
        found = roll_out(parts, config.response, queries, SEED, ("rollout", step))
        probe.mark("rollout")
        probe.stop([len(q) for q in found.queries], [len(r) for r in found.responses])


def supervised(task: Task, folder: Path, probe: Probe) -> None:
    """Optimizer steps of the supervised stage."""
    config = SftConfig(
        model=str(folder / "policy"),
        data=str(folder / "texts.jsonl"),
        template=TEMPLATE,
        block=BLOCK,
        evaluation_rows=1,
        lora=LoraConfig(r=LORA_RANK if task.lora else 0, alpha=float(LORA_ALPHA), dropout=0.0),
        **_training(task),
    )
    steps = timed_steps(probe, [BLOCK] * task.batch, task.vocabulary_size)
    with tempfile.TemporaryDirectory() as scratch, steps:
        sft.sft(config, Path(scratch), seed=SEED, console=Console(file=io.StringIO()))


def judge(task: Task, folder: Path, probe: Probe) -> None:
    """Optimizer steps of the reward stage."""
    config = RewardConfig(
        model=str(folder / "policy"),
        data=str(folder / "pairs.jsonl"),
        template=TEMPLATE,
        lora=LoraConfig(r=LORA_RANK if task.lora else 0, alpha=float(LORA_ALPHA), dropout=0.0),
        **_training(task),
    )
    steps = timed_steps(probe, mean_texts(folder, task.batch), task.vocabulary_size)
    with tempfile.TemporaryDirectory() as scratch, steps:
        reward.reward(config, Path(scratch), seed=SEED, console=Console(file=io.StringIO()))


def _training(task: Task) -> dict[str, Any]:
    return {
        "batch_size": task.batch,
        "max_steps": task.iterations,
        "learning_rate": 1e-6,
        "schedule": "constant",
        "log_every": 1,
        "save_every": 1000,
        "track": (),
        **asked(task),
    }


WORK = {"ppo": ppo, "rollout": rollout, "sft": supervised, "reward": judge}


def main(text: str, root: str, probe: Probe | None = None) -> None:
    """Do one task."""
    task = Task.parse(text)
    reuse_memory()  # as the command does
    WORK[task.work](task, task.folder(Path(root)), probe or Probe())


if __name__ == "__main__":
    main(*sys.argv[1:])
