"""`suasion plan`: what a recipe will need, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from suasion.config.load import parse_overrides, validate
from suasion.config.recipe import load_recipe
from suasion.config.schema import PlanConfig
from suasion.core.errors import CheckError
from suasion.core.files import write_json

FLAGS = ("--card", "--flops", "--json")
"""Options that are none of the recipe's."""
USAGE = """\
usage: suasion plan RECIPE.yaml [--card CARD] [--flops N] [--json FILE] [--stage.key value ...]
       suasion plan MODEL_FOLDER_OR_NAME ...

Says how much memory each stage will need, and what for, from configurations alone: no weights are
read. --card is a size (24GB, 24GiB) or a name (rtx3090, a100-80); default: this machine. --flops
are operations per second to reckon times with; default: the card's, or measured here. --json
writes the plan to a file too. Exit code 8 where a stage does not fit.
How it is reckoned: docs/memory.md"""


def plan(arguments: Sequence[str]) -> int:
    """`plan RECIPE.yaml|MODEL [--card CARD] [--flops N] [--json FILE] [--key.key value ...]`.

    Raises:
        CheckError: a stage does not fit; the plan is printed before.
        ConfigError: a mistake in the recipe or the options, or no such card.
        ModelError: no such model.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    source, *rest = arguments
    own, overrides = _split(rest)
    options = validate(PlanConfig, parse_overrides(own), "the options")
    if Path(source).suffix in (".yaml", ".yml"):
        load_recipe(Path(source), overrides)  # a mistake in it is told before anything is loaded
    from suasion.cli.commands import quiet_libraries

    quiet_libraries()
    from suasion.plan.cards import named
    from suasion.plan.run import plan as body
    from suasion.plan.run import recipe_of, refusal
    from suasion.plan.show import show

    card = named(options.card)
    console = Console()
    with console.status("reckoning"):
        made = body(recipe_of(source, overrides), card, flops=options.flops)
    show(made, console)
    if options.json:
        write_json(Path(options.json), made.as_dict())
    if not made.fits:
        raise CheckError(refusal(made))
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options with their values, and the recipe's."""
    parts: tuple[list[str], list[str]] = ([], [])
    into = parts[1]
    for word in arguments:
        if word.startswith("--"):
            into = parts[0] if word.partition("=")[0] in FLAGS else parts[1]
        into.append(word)
    return parts
