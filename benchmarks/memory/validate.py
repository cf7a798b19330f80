"""Predicted against measured peak memory, for eight settings on this machine's processor.

    python -m benchmarks.memory.validate [--only NAME] [--out FILE.json]

Each setting is one stage of suasion, run by its own code in a fresh process, on random weights of
60 to 70 million parameters. Measured is the peak of the process as the kernel counts it (VmHWM).
Predicted is the plan's peak plus what interpreter and libraries hold, which is measured by the same
stage on a model of a few weights. glibc keeps freed blocks for later, which is not memory in use;
MALLOC_* makes it give them back, in these processes only.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suasion.cli.commands import KINDS, quiet_libraries
from suasion.config.load import parse_overrides, validate
from suasion.config.schema import QUESTION_ANSWER
from suasion.core.files import write_json, write_text

TARGET = 0.10
"""Largest relative error that is accepted."""
WORDS = 9000
VOCABULARY = 12288
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 640, "n_layer": 12, "n_head": 10, "n_positions": 512},
    "llama": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "max_position_embeddings": 512,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}
LORA = {"r": 16, "merge": False}
INT8 = {**LORA, "base": "int8"}


@dataclass(frozen=True)
class Setting:
    """One stage on one model."""

    name: str
    """For the table."""
    stage: str
    """sft, reward, ppo."""
    family: str
    """gpt2 or llama."""
    values: dict[str, Any] = field(default_factory=dict)
    """Options of the stage."""


SETTINGS = (
    Setting("full, 8 x 128", "sft", "gpt2", {"batch_size": 8, "block": 128}),
    Setting("lora, 4 x 256", "sft", "gpt2", {"batch_size": 4, "block": 256, "lora": LORA}),
    Setting("lora int8, 2 x 512", "sft", "gpt2", {"batch_size": 2, "block": 512, "lora": INT8}),
    Setting("full, 4 x 384", "sft", "llama", {"batch_size": 4, "block": 384}),
    Setting("lora int8, 16 x 64", "sft", "llama", {"batch_size": 16, "block": 64, "lora": INT8}),
    Setting(
        "lora, 6 pairs x 200", "reward", "llama", {"batch_size": 6, "max_length": 200, "lora": LORA}
    ),
    Setting("full, 16 x (96 + 32)", "ppo", "llama", {"micro_batch_tokens": 1024}),
    Setting("lora int8, 16 x (96 + 32)", "ppo", "gpt2", {"micro_batch_tokens": 2048, "lora": INT8}),
)
COMMON: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 2, "evaluation_rows": 8, "track": []},
    "reward": {"max_steps": 2, "too_long": "cut", "track": []},
    "ppo": {
        "steps": 2,
        "batch_size": 16,
        "mini_batch_size": 16,
        "epochs": 1,
        "prompt_tokens": 96,
        "too_long": "cut",
        "response": {"max_tokens": 32},
        "checks": "off",
        "samples": 0,
        "track": [],
    },
}
SMALLEST: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 1, "block": 8, "evaluation_rows": 1},
    "reward": {"batch_size": 1, "max_length": 200},
    "ppo": {"batch_size": 1, "mini_batch_size": 1, "response": {"max_tokens": 1}},
}
"""Sizes of the run that shows what interpreter and libraries hold."""


def make_inputs(folder: Path) -> None:
    """Write models with random weights, and tables of random words."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from suasion.models.load import save_model, train_tokenizer

    tokenizer = train_tokenizer(["Question: how long?\n\nAnswer: not long at all."], 290)
    special = {
        "vocab_size": VOCABULARY,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for size, shapes in (("real", SHAPES), ("tiny", TINY)):
        for family, shape in shapes.items():
            config = AutoConfig.for_model(family, **special, **shape)
            for kind, name in (
                (AutoModelForCausalLM, "model"),
                (AutoModelForSequenceClassification, "judge"),
            ):
                config.num_labels = 1
                model = kind.from_config(config)
                save_model(folder / f"{family}-{size}-{name}", model, tokenizer, QUESTION_ANSWER)
    chance = random.Random(1)  # noqa: S311 (not for secrets)

    def words(count: int) -> str:
        return "".join(f"w{chance.randrange(WORDS)}x" for _ in range(count))

    rows = [
        {"query": words(40), "response": words(40), "chosen": words(20), "rejected": words(18)}
        for _ in range(120)
    ]
    write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def measured(folder: Path, setting: Setting, size: str) -> int:
    """Peak of a fresh process that runs the setting, in bytes."""
    with tempfile.TemporaryDirectory() as out:
        call = {"stage": setting.stage, "values": options(folder, setting, size), "folder": out}
        environment = {**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "benchmarks.memory.measure", json.dumps(call)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{setting.name}: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def options(folder: Path, setting: Setting, size: str) -> dict[str, Any]:
    """What the stage is given."""
    values = {"precision": "fp32", **COMMON[setting.stage], **setting.values}
    if size == "tiny":
        values |= SMALLEST[setting.stage]
    values |= {
        "model": str(folder / f"{setting.family}-{size}-model"),
        "data": str(folder / "rows.jsonl"),
    }
    if setting.stage == "ppo":
        values["reward"] = str(folder / f"{setting.family}-{size}-judge")
    return values


def predicted(folder: Path, setting: Setting) -> tuple[int, str, int]:
    """Peak of the plan without interpreter and libraries, its phase, and what stays mapped.

    Where layers are quantised as they are read, the file in which they are in fp32 stays mapped as
    long as one tensor of it is used as it is. The kernel counts its pages as the process's, and
    takes them back when it needs memory; a plan leaves them out.
    """
    from suasion.plan.cards import this_machine
    from suasion.plan.planner import Planner

    config = validate(KINDS[setting.stage], options(folder, setting, "real"), setting.name)
    stage = Planner(replace(this_machine(), process=0)).stage(setting.stage, config)
    most = max(stage.phases, key=lambda phase: phase.total)
    mapped = 4 * sum(role.weights.get("int8", 0) for role in stage.roles)
    return most.total, most.name, mapped


def main() -> int:
    """Measure and predict; 1 if any setting is off by more than `TARGET`."""
    given = parse_overrides(sys.argv[1:])
    quiet_libraries()
    rows: list[dict[str, Any]] = []
    baselines: dict[tuple[str, ...], int] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder)
        for setting in SETTINGS:
            if str(given.get("only", "")) not in f"{setting.stage} {setting.family} {setting.name}":
                continue
            at = (setting.stage, setting.family)
            if at not in baselines:
                baselines[at] = measured(folder, setting, "tiny")
            tensors, phase, mapped = predicted(folder, setting)
            peak, whole = measured(folder, setting, "real"), tensors + mapped + baselines[at]
            rows.append(
                {
                    "stage": setting.stage,
                    "family": setting.family,
                    "setting": setting.name,
                    "phase": phase,
                    "libraries": baselines[at],
                    "mapped": mapped,
                    "predicted": whole,
                    "measured": peak,
                    "error": whole / peak - 1,
                    "error_of_tensors": tensors / (peak - mapped - baselines[at]) - 1,
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    if "out" in given:
        write_json(Path(str(given["out"])), rows)
    return int(any(abs(row["error"]) > TARGET for row in rows))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, sizes in MB."""
    table = Table("stage", "family", "setting", "peak in")
    for name in ("libraries", "file", "predicted", "measured", "error", "of tensors alone"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [f"{row[k] / 1e6:,.0f}" for k in ("libraries", "mapped", "predicted", "measured")]
        errors = [f"{row[k]:+.1%}" for k in ("error", "error_of_tensors")]
        table.add_row(row["stage"], row["family"], row["setting"], row["phase"], *sizes, *errors)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
