"""Two processes that train one policy."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.dist
def test_two_processes_train_one_policy(tmp_path: Path) -> None:
    """A divided batch, or the same one on both: the step of one process. Other batches: another."""
    subprocess.run(  # noqa: S603  our own script
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            "--local-addr=127.0.0.1", str(SCRIPT), str(tmp_path / "2"),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=180,
    )  # fmt: skip
    runpy.run_path(str(SCRIPT))["main"](str(tmp_path / "1"))
    alone = torch.load(tmp_path / "1-0.pt", weights_only=True)
    first = torch.load(tmp_path / "2-0.pt", weights_only=True)
    second = torch.load(tmp_path / "2-1.pt", weights_only=True)
    assert first.keys() == second.keys() == alone.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
    same = [name for name in alone if name.startswith(("divided.", "same."))]
    assert len(same) > 20
    for name in same:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6, msg=name)
    other = [name for name in alone if name.startswith("other.")]
    assert any(not torch.allclose(first[name], alone[name], atol=1e-5) for name in other)
