"""One tiny run that many tests look at, and the means to run commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import TINY, Commands, open_commands


@pytest.fixture(scope="session")
def suasion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs `suasion` in processes of their own."""
    with open_commands(tmp_path_factory.mktemp("commands")) as commands:
        yield commands


@pytest.fixture(scope="session")
def demo(suasion: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny demo, run from beginning to end; not to be written to."""
    out = tmp_path_factory.mktemp("demo") / "run"
    suasion.done("demo", "--out", out, *TINY)
    return out
