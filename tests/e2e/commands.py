"""Running `suasion` as a process of its own, and the smallest pipeline there is."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds after which something hangs."""

TINY = shlex.split("""
    --questions 250 --threads 1
    --pretrain.fresh.vocabulary 320 --pretrain.fresh.hidden_size 32 --pretrain.fresh.layers 2
    --pretrain.fresh.heads 2 --pretrain.block 64 --pretrain.batch_size 8 --pretrain.max_steps 12
    --pretrain.save_every 3 --pretrain.log_every 2
    --sft.block 64 --sft.batch_size 8 --sft.max_steps 12 --sft.save_every 3 --sft.log_every 2
    --reward.batch_size 4 --reward.max_steps 12 --reward.save_every 3 --reward.log_every 2
    --ppo.steps 4 --ppo.save_every 1 --ppo.batch_size 8 --ppo.mini_batch_size 4
    --ppo.response.max_tokens 16 --ppo.samples 2 --ppo.sample_every 2
    --evaluate.prompts 10 --evaluate.response.max_tokens 16
    --evaluate.evaluation_pairs 40 --evaluate.evaluation_rows 20
""")
"""Overrides that make the demo run in seconds; it learns next to nothing."""

MODELS = (
    "pretrain/start/model.safetensors",
    "pretrain/model/model.safetensors",
    "sft/model/model.safetensors",
    "reward/model/model.safetensors",
    "ppo/model/model.safetensors",
    "ppo/critic/value_head.safetensors",
)
"""Every weight file of that pipeline."""


@dataclass(frozen=True)
class Outcome:
    """A command that ended."""

    code: int
    """Exit code; negative: killed by that signal."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    process: int
    poll: Callable[[], int | None]
    out: Path
    err: Path

    def wait(self) -> Outcome:
        """Wait until it ends."""
        code = until(self.poll, "the command to end")
        return Outcome(code, self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def stop(self, number: signal.Signals, *, when: Callable[[], object]) -> Outcome:
        """Send a signal as soon as `when()` is true."""
        until(lambda: when() or self.poll() is not None, "the moment to stop")
        os.kill(self.process, number)
        return self.wait()


class Commands:
    """Starts commands; use `open_commands`."""

    def __init__(self, zygote: subprocess.Popen[str], folder: Path) -> None:
        self._zygote = zygote
        self._folder = folder
        self._count = 0
        self._codes: dict[int, int] = {}

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        largest_file: int = 0,
        kill: str = "",
    ) -> Running:
        """Start `suasion ARGUMENTS`.

        Args:
            arguments: Its words.
            cwd: Folder to run in.
            largest_file: Bytes beyond which writing to a file fails; 0: no limit.
            kill: Where the process is to be killed, see `tests.e2e.killing`.
        """
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        process = self._ask(
            start=[str(word) for word in arguments],
            cwd=str(cwd or self._folder),
            out=str(out),
            err=str(err),
            largest_file=largest_file,
            kill=kill,
        )
        return Running(process, lambda: self._poll(process), out, err)

    def run(self, *arguments: object, **options: Any) -> Outcome:
        """Run `suasion ARGUMENTS` to its end."""
        return self.start(*arguments, **options).wait()

    def done(self, *arguments: object, **options: Any) -> str:
        """Run a command that must succeed and say nothing on standard error; its output."""
        outcome = self.run(*arguments, **options)
        assert (outcome.code, outcome.err) == (0, ""), outcome
        return outcome.out

    def refused(self, code: int, *arguments: object, **options: Any) -> str:
        """Run a command that must end with `code` and one message; the message."""
        outcome = self.run(*arguments, **options)
        assert outcome.code == code, outcome
        assert "Traceback" not in outcome.err, outcome.err
        assert outcome.err.count("Error: ") >= 1, outcome.err
        assert outcome.err.split(":")[0].endswith("Error"), outcome.err
        return outcome.err

    def _poll(self, process: int) -> int | None:
        if process not in self._codes:
            code = self._ask(poll=process)
            if code is None:
                return None
            self._codes[process] = code
        return self._codes[process]

    def _ask(self, **request: Any) -> Any:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return json.loads(self._zygote.stdout.readline())


@contextmanager
def open_commands(folder: Path) -> Iterator[Commands]:
    """Start the process that starts commands; their output goes to files in `folder`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "400",
        "PYTHONWARNINGS": "ignore",
    }
    with subprocess.Popen(  # noqa: S603 (our own script)
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as zygote:
        yield Commands(zygote, folder)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until `condition()` is neither None nor False; its value."""
    deadline = time.monotonic() + PATIENCE
    while (value := condition()) is None or value is False:
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.004)
    return value


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))


def lines(path: Path) -> list[Any]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
