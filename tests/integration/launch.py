"""A tiny recipe, and the means to run it as one process or as several that a launcher starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from suasion.config.schema import QUESTION_ANSWER
from suasion.core.files import keep_json_lines, read_json_lines
from suasion.models.load import fresh_causal_lm, save_model, train_tokenizer

ROWS = [
    {
        "query": f"How many are {n} and {'one ' * (n % 4)}{n + 1}?",
        "response": f"They are {2 * n + 1}, {'well ' * (n % 3)}counted.",
        "chosen": f"They are {2 * n + 1}.",
        "rejected": f"I think {'they ' * (n % 5)}are {n}.",
    }
    for n in range(32)
]
REWARD = '''
import os

calls = 0


def reward(queries, responses):
    """Something that differs from response to response, and not with the others."""
    global calls
    calls += 1
    if os.environ.get("SUASION_TEST_REFUSE") == f"{os.environ.get('RANK')}:{calls}":
        raise ValueError("no such answer")
    return [(sum(map(ord, q + r)) % 37) / 10 - len(r) / 20 for q, r in zip(queries, responses)]
'''
TRAINER: dict[str, Any] = {
    "max_steps": 6,
    "save_every": 2,
    "log_every": 1,
    "batch_size": 2,
    "track": [],
    "learning_rate": 1e-3,
    "block": 48,
}
POLICY: dict[str, Any] = {
    "steps": 3,
    "batch_size": 7,
    "mini_batch_size": 3,
    "epochs": 2,
    "learning_rate": 1e-3,
    "optimizer_options": {"eps": 1e-4},
    "response": {"max_tokens": 10, "min_sampled": 4},
    "score": {"scale": True, "no_eos": "subtract", "overlong": 3},
    "kl": {"coef": 0.1, "horizon": 50.0},
    "critic": {"warmup": 1, "lam": 1.0},
    "samples": 3,
    "sample_every": 1,
    "save_every": 1,
    "track": [],
}


def world(folder: Path) -> Path:
    """A folder with a model, a table and a reward function."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_json_lines(folder / "rows.jsonl", ROWS)
    text = "\n".join(row["query"] + " " + row["response"] for row in ROWS)
    (folder / "text.txt").write_text(text, "utf-8")
    (folder / "judge.py").write_text(REWARD, "utf-8")
    tokenizer = train_tokenizer([row["query"] + row["response"] for row in ROWS], 280)
    model = fresh_causal_lm(
        family="llama", tokenizer=tokenizer, context=96, hidden_size=32, layers=2, heads=2, seed=3
    )
    with torch.no_grad():  # sharper than the library draws it
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    save_model(folder / "model", model, tokenizer, QUESTION_ANSWER)
    return folder


def recipe(folder: Path, name: str, **stages: dict[str, Any]) -> Path:
    """Write a recipe whose stages read from `folder` and write into `folder / name`."""
    given = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl")}
    inputs: dict[str, dict[str, Any]] = {
        "pretrain": {"text": str(folder / "text.txt")},
        "ppo": {**given, "reward": f"{folder / 'judge.py'}:reward"},
    }
    values: dict[str, Any] = {"name": name, "out": str(folder / name), "threads": 1}
    for stage, options in stages.items():
        values[stage] = {**inputs.get(stage, given), **options}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def launch(
    processes: int, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `suasion ARGUMENTS` in so many processes, of one thread each, to its end.

    Args:
        processes: How many; a launcher starts them.
        arguments: Words of the command.
        environment: Variables to add; with SUASION_TEST_KILL the run is killed.
    """
    program = ["-m", "suasion.cli.main"]
    if "SUASION_TEST_KILL" in environment:
        program = [str(Path(__file__).parents[1] / "e2e" / "killing.py")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    quiet = {"PYTHONWARNINGS": "ignore", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # noqa: S603 (our own program)
        [
            sys.executable,
            *launcher,
            f"--nproc-per-node={processes}",
            *program,
            *map(str, arguments),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file without what depends on the clock."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_json_lines(path)
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of every weight file below a folder, by file and name."""
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    """A stage's manifest."""
    stored: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return stored
