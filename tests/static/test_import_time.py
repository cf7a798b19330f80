"""`import suasion` is not worth waiting for."""

from __future__ import annotations

import resource
import subprocess
import sys

LIMIT = 0.3
"""Processor seconds, which a busy machine does not change; the interpreter's own included."""


def processor_seconds(code: str) -> float:
    """What a fresh interpreter spends on running `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_is_quick() -> None:
    """The best of three; importing torch alone takes several times the limit."""
    assert min(processor_seconds("import suasion") for _ in range(3)) < LIMIT
    assert processor_seconds("import torch") > LIMIT
