"""The examples run, and show what they say."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples" / "classic"


def main_of(name: str) -> Callable[..., Any]:
    """The `main` of an example."""
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_all_examples_are_run_here() -> None:
    """A new example needs a test."""
    source = Path(__file__).read_text(encoding="utf-8")
    missing = [p.stem for p in EXAMPLES.glob("*.py") if f'main_of("{p.stem}")' not in source]
    assert not missing


def test_quick_start() -> None:
    """One step of one response, from a ratio of one."""
    stats = main_of("quick_start")()
    assert stats["ppo/mean_scores"] == 1.0
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_sentiment_loop(tmp_path: Path) -> None:
    """The reward rises and TensorBoard has a file."""
    means = main_of("sentiment_loop")(steps=14, logging_dir=str(tmp_path))
    assert sum(means[-4:]) > sum(means[:4])
    assert list(tmp_path.rglob("events.*"))


def test_lora_reference_off() -> None:
    """Adapters are a small part, and KL begins at zero."""
    found = main_of("lora_reference_off")()
    assert found["trained"] < found["parameters"] / 4
    assert found["kl_first"] == pytest.approx(0.0, abs=1e-5)
    assert abs(found["kl_second"]) > 1e-4


def test_optimizers_and_schedules() -> None:
    """The rate falls by a tenth per step."""
    rates = main_of("optimizers_and_schedules")()
    assert rates["Adam"] == pytest.approx([1e-3, 9e-4, 8.1e-4])
    assert rates["SGD"] == pytest.approx([1e-2, 9e-3, 8.1e-3])


def test_shared_layers() -> None:
    """The reference costs the memory of its own layers only."""
    found = main_of("shared_layers")()
    assert found["reference_only"] < found["policy"] / 2
    assert found["learning"] < found["policy"] / 2


def test_reward_trainer() -> None:
    """Both column styles are learnt."""
    assert main_of("reward_trainer")() == {"texts": 1.0, "tokens": 1.0}


def test_stackllama_three_stages(tmp_path: Path) -> None:
    """Every stage leaves a model the next one reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        stats = main_of("stackllama_three_stages")(tmp_path)
    assert stats["ppo/updates"] >= 1
    assert (tmp_path / "policy" / "adapter_config.json").is_file()
    assert (tmp_path / "policy" / "value_head.safetensors").is_file()
