"""What roles cost: the peak of a PPO iteration with one, two and four of them on one base.

    python -m benchmarks.memory.roles [--hidden_size 512] [--layers 8] [--base fp32]

A llama of random weights; LoRA of rank 8 on every linear layer; AdamW. Each case runs three
iterations in a process of its own and prints the peak of the bytes of tensors it held (`held.py`),
and that of the process, libraries and all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.memory.held import Held
from suasion.cli.build import ppo_parts
from suasion.config.schema import (
    QUESTION_ANSWER,
    CriticConfig,
    LoraConfig,
    PpoConfig,
    ReferenceConfig,
    ResponseConfig,
)
from suasion.core.files import keep_json_lines
from suasion.models.adapters import add_lora
from suasion.models.load import (
    fresh_causal_lm,
    load_codec,
    new_reward_model,
    save_model,
    train_tokenizer,
)
from suasion.trainers.ppo import PpoLoop, PpoParts

QUERIES = [f"How many are {n} and {n + 1}, and why is it not one more?" for n in range(64)]
ITERATIONS = 3
RANK = 8
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""Large blocks go back to the system at once: else a process keeps what it has let go."""
CASES = ("policy alone", "four roles, one base", "four models")


def write_models(folder: Path, *, hidden_size: int, layers: int, rank: int = RANK) -> None:
    """A base with its tokenizer, a reward adapter on it, and the reward model as a whole."""
    tokenizer = train_tokenizer(QUERIES, 512)
    model = fresh_causal_lm(
        family="llama",
        tokenizer=tokenizer,
        context=256,
        hidden_size=hidden_size,
        layers=layers,
        heads=hidden_size // 32,
        seed=1,
    )
    save_model(folder / "base", model, tokenizer, QUESTION_ANSWER)
    codec = load_codec(str(folder / "base"), QUESTION_ANSWER)
    judge: Any = new_reward_model(str(folder / "base"), codec.pad_id, torch.float32, seed=1)
    save_model(folder / "judge", judge, tokenizer, QUESTION_ANSWER)
    judge = add_lora(judge, LoraConfig(r=rank), head=True)
    save_model(folder / "reward", judge, tokenizer, QUESTION_ANSWER)
    keep_json_lines(folder / "queries.jsonl", [{"query": query} for query in QUERIES])


def config_of(case: str, folder: Path, base: Any) -> PpoConfig:
    """The policy stage of a case."""
    shared = PpoConfig(
        model=str(folder / "base"),
        data=str(folder / "queries.jsonl"),
        reward=str(folder / "reward"),
        shared_base=True,
        batch_size=16,
        mini_batch_size=8,
        epochs=1,
        micro_batch_tokens=512,
        critic=CriticConfig(kind="reward_model"),
        lora=LoraConfig(r=RANK, base=base),
        response=ResponseConfig(max_tokens=32),
        samples=0,
        track=(),
    )
    if case == CASES[0]:
        alone = ReferenceConfig(kind="none")
        function = f"{Path(__file__)}:nothing"
        return replace(
            shared,
            reward=function,
            shared_base=False,
            reference=alone,
            critic=CriticConfig(kind="value_head"),
        )
    if case == CASES[2]:
        apart = ReferenceConfig(kind="model", model=str(folder / "base"), base=base)
        return replace(shared, reward=str(folder / "judge"), shared_base=False, reference=apart)
    return shared


def nothing(queries: list[str], responses: list[str]) -> list[float]:
    """A reward that holds no weights."""
    return [float(len(a) - len(q)) for q, a in zip(queries, responses, strict=True)]


def held_by(parts: PpoParts) -> Iterator[Tensor]:
    """Every weight of every role."""
    modules = [parts.policy.model, parts.critic.module]
    others = (parts.reference, parts.reward.reward)
    modules += [getattr(role, "model", None) for role in others]  # a function holds none
    for module in modules:
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()


def measure(case: str, folder: Path, base: str) -> dict[str, int]:
    """Bytes of the weights, of all tensors at their peak, and of the process at its peak."""
    torch.set_num_threads(1)
    config = config_of(case, folder, base)
    parts = ppo_parts(config, seed=1)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    loop = PpoLoop(
        parts, config, folder=out, seed=1, console=Console(quiet=True), log=lambda *_: None
    )
    with Held(held_by(parts)) as held:
        for step in range(ITERATIONS):
            loop.iteration(step)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"weights": held.begun, "peak": held.peak, "process": whole}


def main() -> None:
    """Measure every case in a process of its own; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--base", default="fp32", choices=("fp32", "bf16", "int8", "nf4"))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case, given.folder, given.base)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, hidden_size=given.hidden_size, layers=given.layers)
        print(f"| {given.base} | weights, MB | peak, MB | against the policy alone | process, MB |")
        print("|---|---|---|---|---|")
        alone = 0
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.memory.roles", "--case", case]
            command += ["--folder", name, "--base", given.base]
            done = subprocess.run(  # noqa: S603
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **RETURNING},
            )
            found = json.loads(done.stdout.splitlines()[-1])
            alone = alone or found["peak"]
            weights, peak, grown = (found[key] / 1e6 for key in ("weights", "peak", "process"))
            share = found["peak"] / alone
            print(f"| {case} | {weights:.1f} | {peak:.1f} | {share:.2f} | {grown:.1f} |")


if __name__ == "__main__":
    main()
