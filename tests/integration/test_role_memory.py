"""Four roles on one base hold little more than the policy alone; counted in bytes, not timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.memory.held import Held
from benchmarks.memory.roles import CASES, config_of, held_by, write_models
from rich.console import Console

from suasion.cli.build import ppo_parts
from suasion.trainers.ppo import PpoLoop

MOST = 1.15
"""Peak of a PPO iteration with four roles over that of the policy alone with its optimizer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose base is large beside an adapter of rank 2."""
    made = tmp_path_factory.mktemp("memory")
    write_models(made, hidden_size=128, layers=2, rank=2)
    return made


def peak_of(case: str, folder: Path) -> tuple[int, int]:
    """Bytes of weights and, over two iterations, of all tensors at their peak."""
    config = config_of(case, folder, "fp32")
    config = replace(config, lora=replace(config.lora, r=2), batch_size=4, mini_batch_size=2)
    parts = ppo_parts(config, seed=1)
    loop = PpoLoop(
        parts, config, folder=folder, seed=1, console=Console(quiet=True), log=lambda *_: None
    )
    with Held(held_by(parts)) as held:
        for step in range(2):
            loop.iteration(step)
    return held.begun, held.peak


def test_four_roles_cost_little_more_than_one(folder: Path) -> None:
    """And four models of their own cost what this saves, so the count sees the difference."""
    (base, alone), (_, shared), (_, apart) = (peak_of(case, folder) for case in CASES)
    print(base, alone, shared, apart)
    assert shared <= MOST * alone
    assert apart > alone + 2 * base


def test_weights_in_the_order_of_a_kernel_count() -> None:
    """They have no storage of their own to ask; gone with their tensor."""
    with Held([]) as held:
        weight = torch.ones(64, 32).to_mkldnn()
        assert held.now == 64 * 32 * 4
        del weight
        assert held.now == 0
    assert held.peak >= 64 * 32 * 4
