"""Freed memory stays with the process, unless the environment says otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource
PR_SET_THP_DISABLE = 41  # pages of 4 KB, whatever the host's are
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
from suasion.core.memory import reuse_memory
import torch
print(reuse_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
before = faults()
for _ in range(10):
    torch.ones(1 << 24)
print(faults() - before)
"""
PAGES = (1 << 26) // 4096
"""Of one of the script's tensors."""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's own switch")
def test_a_large_tensor_gets_pages_that_were_used_before() -> None:
    """Ten tensors of 64 MB, and fewer new pages than one of them has; by default, all of them."""
    changed, faults = run({})
    if not changed:
        pytest.skip("another C library")
    assert faults < PAGES
    changed, faults = run({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not changed
    assert faults > 5 * PAGES


def run(environment: dict[str, str]) -> tuple[bool, int]:
    """Whether anything was changed, and page faults of ten large tensors."""
    found = subprocess.run(  # noqa: S603
        [sys.executable, "-c", SCRIPT],
        env={"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    changed, faults = found.stdout.split()
    return changed == "True", int(faults)
