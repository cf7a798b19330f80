"""The exception tree.

    SuasionError
    ├── ConfigError      a recipe or an option is wrong               exit code 2
    ├── DataError        an input file or a row of it is wrong        exit code 3
    ├── ModelError       a model folder cannot be used                exit code 4
    ├── RewardError      a reward function returned something unusable exit code 5
    ├── TrainingError    training went somewhere no one wants         exit code 6
    ├── StorageError     the disk refused (full, read-only)           exit code 7
    └── CheckError       a check before the run found a fault         exit code 8

A message names what is wrong, where it is, and what to do about it; the command line prints it
without a traceback and exits with the class's code.
"""

from __future__ import annotations


class SuasionError(Exception):
    """Base of everything a user can mend.

    Args:
        what: What is wrong and where: file, line, row, key.
        fix: What to do about it, as an instruction. Empty when `what` already says it.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}\n  -> {fix}" if fix else what)
        self.what = what
        self.fix = fix


class ToldElsewhere(Exception):  # noqa: N818 (no error of its own)
    """This process cannot go on because another one of its run failed first, and says why."""


class ConfigError(SuasionError):
    """A recipe, an option or a combination of options is wrong."""

    exit_code = 2


class DataError(SuasionError):
    """An input file, or one row of it, cannot be used."""

    exit_code = 3


class ModelError(SuasionError):
    """A model folder or tokenizer cannot be used for the job."""

    exit_code = 4


class RewardError(SuasionError):
    """A reward function returned the wrong number of scores, or scores that are not finite."""

    exit_code = 5


class TrainingError(SuasionError):
    """Training produced something that must not be continued from."""

    exit_code = 6


class StorageError(SuasionError):
    """The disk refused a write."""

    exit_code = 7


class CheckError(SuasionError):
    """Checks before a run found faults that would ruin it."""

    exit_code = 8
