"""The command line: find the command, run it, turn mistakes into one message and an exit code.

Nothing heavy is imported here, so that help and mistakes in a recipe answer at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence

from suasion.core.errors import StorageError, SuasionError, ToldElsewhere
from suasion.core.files import FULL

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

FOLLOWED = 1
"""Exit code of a process that stopped because another one of its run did."""

REFUSALS = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""What the operating system says when it will not write somewhere."""
FULL_DISK = ("No space left", "File too large", "disk is full", "inline_container.cc")
"""How libraries that write for themselves put it; the last is torch.save cut short."""

HELP = """\
suasion: from people's votes to a model they prefer, with every step checked

  suasion demo [--out DIR] [--seed N]     the whole pipeline on a small world with a known truth
  suasion run RECIPE.yaml [--key.key V]   the stages of a recipe; finished ones are skipped
  suasion check RECIPE.yaml [--only NAME]   faults that would ruin its policy stage, in a minute
  suasion plan RECIPE.yaml [--card 24GB]    how much memory each stage will need

stages, each on its own:
  suasion prepare stackexchange DUMP_DIR --out DIR    votes -> questions, answers, pairs
  suasion pretrain --text PATH --out DIR              raw text -> language model
  suasion sft      --model M --data D --out DIR       questions and answers -> supervised model
  suasion reward   --model M --data D --out DIR       pairs -> reward model
  suasion ppo      --model M --reward R --data D --out DIR   reward -> policy
  suasion merge    --model ADAPTER --data D --out DIR        adapter + base -> plain model
  suasion evaluate --before A --after B --data D --out DIR   two models side by side
  suasion generate --model M --prompt TEXT            answers of a model
  suasion report   RUN_DIR                            one page about a run

  suasion COMMAND --help                  every option with its default
  suasion --version

on N processors or GPUs: torchrun --nproc_per_node N -m suasion.cli.main COMMAND ...

exit codes: 0 done, 2 configuration, 3 data, 4 model, 5 reward, 6 training, 7 disk, 8 check,
            130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the program's name; default: the process's.

    Returns:
        The exit code.
    """
    # Before torch is loaded: its threads else spin for milliseconds while they wait for each other,
    # and where another program wants the same cores, a stage of seconds takes minutes. Spinning
    # this shortly costs nothing measurable on free cores (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        from suasion import __version__

        print(f"suasion {__version__}")
        return 0
    try:
        from suasion.cli.commands import command_of
        from suasion.core.ranks import joined

        with joined() as ranks:
            return command_of(words[0])(words[1:], ranks)
    except ToldElsewhere:
        return FOLLOWED
    except SuasionError as error:
        return _explain(error)
    except KeyboardInterrupt:
        again = shlex.join(["suasion", *words])
        from suasion.core.ranks import launched

        if launched() > 1:
            again += "  (by torchrun, with as many processes)"
        print(
            f"\ninterrupted; what was finished is kept. To go on, run the same command:\n  {again}",
            file=sys.stderr,
        )
        return INTERRUPTED
    except OSError as error:
        if error.errno in REFUSALS:
            fix = "free some space" if error.errno in FULL else "write somewhere else"
            return _explain(_refused(str(error.filename or "the output"), error.strerror, fix))
        raise
    except Exception as error:
        if any(words in str(error) for words in FULL_DISK):
            reason = f"the disk is full ({error})"
            return _explain(_refused("the output", reason, "free some space"))
        raise


def _refused(where: str, reason: str | None, fix: str) -> StorageError:
    return StorageError(
        f"cannot write {where}: {reason}",
        f"{fix} and run the same command again; finished stages are kept",
    )


def _explain(error: SuasionError) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
