"""Each command of `suasion`: arguments in, exit code out."""

from __future__ import annotations

import difflib
import io
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from suasion.cli.planning import plan
from suasion.config import schema
from suasion.config.load import parse_overrides, validate
from suasion.config.recipe import load_recipe
from suasion.core.errors import ConfigError, DataError
from suasion.core.ranks import Ranks

Command = Callable[[Sequence[str], Ranks], int]
"""(arguments, processes it runs in) -> exit code."""

NEEDS = {
    "pretrain": ("text",),
    "sft": ("model", "data"),
    "reward": ("model", "data"),
    "ppo": ("model", "reward", "data"),
    "merge": ("model", "data"),
    "evaluate": ("data",),
}
"""Inputs a stage needs when it is called alone."""

KINDS: dict[str, type[Any]] = {
    "pretrain": schema.PretrainConfig,
    "sft": schema.SftConfig,
    "reward": schema.RewardConfig,
    "ppo": schema.PpoConfig,
    "merge": schema.MergeConfig,
    "evaluate": schema.EvaluateConfig,
}


def stage(name: str, arguments: Sequence[str], ranks: Ranks) -> int:
    """One stage on its own."""
    from suasion.cli.options import need, parse_stage

    call = parse_stage(KINDS[name], name, arguments)
    need(name, **{key: getattr(call.config, key) for key in NEEDS[name]})
    _run_one(name, call, ranks)
    return 0


def prepare(arguments: Sequence[str], ranks: Ranks) -> int:
    """`prepare stackexchange DUMP_DIR --out DIR`."""
    from suasion.cli.options import parse_stage, show_help

    if not arguments or arguments[0] in ("-h", "--help"):
        show_help(schema.PrepareConfig, "prepare stackexchange DUMP_DIR")
        return 0
    kind, *rest = arguments
    if kind != "stackexchange":
        raise ConfigError(
            f"prepare {kind}: unknown kind of source",
            "suasion prepare stackexchange DUMP_DIR --out DIR; preference tables with the columns "
            "query, chosen, rejected need no preparing",
        )
    if rest and not rest[0].startswith("-"):
        rest = ["--dump", *rest]
    call = parse_stage(schema.PrepareConfig, "prepare stackexchange", rest)
    _run_one("prepare", call, ranks)
    return 0


def _run_one(name: str, call: Any, ranks: Ranks) -> None:
    from suasion.cli.run import set_up_processor
    from suasion.cli.stages import run_stage

    quiet_libraries()
    set_up_processor(call.threads)
    run_stage(
        name, call.config, Path(call.out), seed=call.seed, console=console_of(ranks), ranks=ranks
    )


def run(arguments: Sequence[str], ranks: Ranks) -> int:
    """`run RECIPE.yaml [--key.key value ...]`."""
    from suasion.cli.options import show_help

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: suasion run RECIPE.yaml [--stage.key value ...]\n")
        show_help(schema.Recipe, "run RECIPE.yaml")
        return 0
    path, *overrides = arguments
    recipe = load_recipe(Path(path), overrides)
    quiet_libraries()
    from suasion.cli.run import run_recipe

    run_recipe(recipe, console_of(ranks), ranks)
    return 0


def console_of(ranks: Ranks) -> Console:
    """A console that is heard of one process only."""
    console = Console() if ranks.first else Console(file=io.StringIO(), quiet=True)
    if ranks.world > 1:
        console.print(f"{ranks.world} processes")
    return console


def check(arguments: Sequence[str]) -> int:
    """`check RECIPE.yaml [--only NAME,...] [--key.key value ...]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: suasion check RECIPE.yaml [--only NAME,...] [--stage.key value ...]\n\n"
            "Builds the recipe's policy stage from the models that are there, and looks for\n"
            "faults that would ruin its run. Exit code 8 if it finds any, unless --ppo.checks is\n"
            "report. --only takes names of checks, with commas between them.\n"
            "What each check looks at: docs/checks.md"
        )
        return 0
    path, *rest = arguments
    only = parse_overrides(rest).get("only")
    recipe = load_recipe(Path(path), _without(rest, "--only"))
    quiet_libraries()
    from suasion.cli.build import check as body
    from suasion.cli.run import set_up_processor
    from suasion.watch.suite import CHECKS, chosen

    names = chosen(only.split(",")) if isinstance(only, str) else tuple(CHECKS)
    set_up_processor(recipe.threads)
    body(recipe, names, Console())
    return 0


def demo(arguments: Sequence[str], ranks: Ranks) -> int:
    """`demo [--out DIR] [--seed N] [--questions N] [--key.key value ...]`."""
    if any(word in ("-h", "--help") for word in arguments):
        print(
            "usage: suasion demo [--out DIR] [--seed N] [--questions N] [--stage.key value ...]\n\n"
            "Writes a small Stack Exchange dump with a known truth into DIR/dump (default\n"
            "runs/demo), then runs the whole pipeline on it. Any key of the recipe can be\n"
            "overridden; see suasion run --help."
        )
        return 0
    given = parse_overrides(arguments)
    values: dict[str, Any] = {k: given[k] for k in ("out", "seed", "questions") if k in given}
    options = validate(schema.DemoConfig, values, "the options")
    from suasion.data.world import write_dump

    dump = Path(options.out) / "dump"
    recipe = load_recipe(
        Path(__file__).with_name("demo.yaml"),
        [
            *_without(arguments, "--questions"),
            "--prepare.dump",
            str(dump),
            "--out",
            options.out,
            "--seed",
            str(options.seed),
        ],
    )
    quiet_libraries()
    from suasion.cli.run import run_recipe

    console = console_of(ranks)
    console.print(f"[bold]world[/]  {options.questions:,} questions -> {dump}", highlight=False)
    ranks.share(lambda: write_dump(dump, seed=options.seed, questions=options.questions))
    run_recipe(recipe, console, ranks)
    return 0


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments less one flag and its value."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word == flag:
            skip = True
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def generate(arguments: Sequence[str]) -> int:
    """`generate --model M (--prompt TEXT | --data FILE) [--out FILE]`."""
    from suasion.cli.options import need, show_help

    if any(word in ("-h", "--help") for word in arguments):
        show_help(schema.GenerateConfig, "generate")
        return 0
    config = validate(schema.GenerateConfig, parse_overrides(arguments), "the options")
    need("generate", model=config.model)
    if (config.prompt is None) == (config.data is None):
        raise ConfigError("suasion generate needs either --prompt or --data")
    quiet_libraries()
    from suasion.evaluate.generate import generate as body

    body(config, Console())
    return 0


def report(arguments: Sequence[str]) -> int:
    """`report RUN_DIR [--out FILE]`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: suasion report RUN_DIR [--out FILE.html]")
        return 0
    folder, *rest = arguments
    values = parse_overrides(rest)
    unknown = set(values) - {"out"}
    if unknown:
        raise ConfigError(f"suasion report has no option --{min(unknown)}", "it has only --out")
    run_folder = Path(folder)
    if not run_folder.is_dir():
        raise DataError(f"no such run folder: {run_folder}")
    from suasion.evaluate.report import write_report

    page = write_report(
        run_folder, Path(str(values.get("out", run_folder / "report" / "index.html")))
    )
    print(page)
    return 0


def quiet_libraries() -> None:
    """No progress bars and advice of the libraries between our lines; nothing is downloaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("accelerate", "bitsandbytes"):  # the second one talks while it is imported
        logging.getLogger(library).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def command_of(name: str) -> Command:
    """The command of that name.

    Raises:
        ConfigError: there is none; the nearest one is suggested.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
    raise ConfigError(f"unknown command {name!r}", hint)


def one(command: Callable[[Sequence[str]], int]) -> Command:
    """A command that the first process runs for all of them."""
    return lambda arguments, ranks: ranks.share(partial(command, arguments))


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "run": run,
    "check": one(check),
    "plan": one(plan),
    "prepare": prepare,
    **{name: partial(stage, name) for name in KINDS},
    "generate": one(generate),
    "report": one(report),
}
