"""Killing a process at a known moment, with no chance to tidy up.

`kill_at("epoch:3")` kills this process when it would do for the third time what `PLACES` calls
"epoch". Run as a program, `python killing.py ARGUMENTS` is `suasion ARGUMENTS`, and is killed where
SUASION_TEST_KILL says, in the process whose RANK is SUASION_TEST_RANK.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

PLACES = {
    "rollout": ("suasion.models.roles", "Policy", "logits"),
    "epoch": ("suasion.trainers.policy", "PolicyTrainer", "_apply"),
    "save": ("suasion.trainers.checkpoint", "", "write_json"),
    "fit": ("suasion.trainers.fit", "_Trainer", "training_step"),
}
"""A token is sampled; a mini-batch has its gradient; a policy's checkpoint has its weights and
lacks the rest; a pass of the other stages begins."""


def kill_at(moment: str) -> None:
    """Prepare to be killed."""
    place, _, count = moment.partition(":")
    module, kind, name = PLACES[place]
    holder: Any = import_module(module)
    if kind:
        holder = getattr(holder, kind)
    original = getattr(holder, name)
    left = [int(count)]

    def counting(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(holder, name, counting)


if __name__ == "__main__":
    from suasion.cli.main import main

    if os.environ.get("SUASION_TEST_RANK") == os.environ.get("RANK", "0"):
        kill_at(os.environ["SUASION_TEST_KILL"])
    sys.exit(main(sys.argv[1:]))
