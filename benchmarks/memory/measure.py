"""One stage in a process of its own, and the most memory that the process ever held.

Run by `validate.py`, which says what to run in one JSON argument; prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from suasion.cli.commands import KINDS, quiet_libraries
from suasion.cli.run import set_up_processor
from suasion.cli.stages import run_stage
from suasion.config.load import validate


def measure(stage: str, values: dict[str, Any], folder: str) -> int:
    """Run a stage as the command line would; the peak of the process in bytes."""
    quiet_libraries()
    set_up_processor(1)
    config = validate(KINDS[stage], values, "the setting")
    run_stage(stage, config, Path(folder), seed=1, console=Console(file=sys.stderr))
    return high_water()


def high_water() -> int:
    """Most bytes that this process held; `ru_maxrss` would begin with its parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell how much memory a process held")


if __name__ == "__main__":
    print(json.dumps({"peak": measure(**json.loads(sys.argv[1]))}))
