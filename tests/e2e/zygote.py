"""Starts the command line often and fast: imports the libraries once, then forks for each command.

Reads one JSON object per line and answers each with one: {"start": ARGUMENTS, ...} gives a process
id, {"poll": ID} its exit code, or null while it runs.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

import killing

from suasion.cli.main import main

SLOW = (
    "torch.utils.tensorboard",
    "suasion.cli.build",
    "suasion.data.stackexchange",
    "suasion.data.world",
    "suasion.evaluate.generate",
    "suasion.evaluate.report",
    "suasion.evaluate.run",
    "suasion.trainers.pretrain",
    "suasion.trainers.reward",
)


def start(job: dict[str, Any]) -> int:
    """Fork a process that runs one command and ends with its exit code."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        # A job in the background inherits that Ctrl-C is ignored, which is not what is tested.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(job["cwd"])
        for stream, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
        if job["largest_file"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        if job["kill"]:
            killing.kill_at(job["kill"])
        code = main(job["start"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:  # noqa: BLE001 (what Python itself would do with it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poll(process: int) -> int | None:
    """Exit code of a process, negative for a signal, or None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == "__main__":
    for module in SLOW:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if "start" in request else poll(request["poll"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
