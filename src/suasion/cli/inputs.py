"""What a recipe reads, looked for before its first stage: a slip in its last one shows at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suasion.cli.stages import BODIES
from suasion.core.errors import DataError, SuasionError
from suasion.models.load import require_model_folder

DATA = ("dump", "text", "data")
"""Options that name a file or a folder; the others name models or rewards."""


def look_for_inputs(stages: Mapping[str, Any], out: Path) -> None:
    """Look whether everything is there that no stage of the run will make.

    Args:
        stages: Options of each stage, in order.
        out: The run's folder.

    Raises:
        DataError: no such file or folder.
        ModelError: no such model folder.
    """
    made: list[Path] = []
    found: list[SuasionError] = []
    for stage, config in stages.items():
        for name in BODIES[stage][1]:
            source = getattr(config, name)
            if source and not any(_within(source, folder) for folder in made):
                try:
                    _look_for(name, source)
                except SuasionError as error:
                    found.append(type(error)(f"{stage}.{name}: {error.what}", error.fix))
        made.append(out / stage)
    if found:
        first, *others = found
        more = "".join(f"\n{error.what}" for error in others)
        raise type(first)(first.what + more, first.fix)


def _look_for(name: str, source: str) -> None:
    if name in DATA:
        if not Path(source).exists():
            raise DataError(f"no such file or folder: {source}", "check the path")
    elif ":" not in source:  # a function or a pipeline is looked for where it is loaded
        require_model_folder(source)


def _within(source: str, folder: Path) -> bool:
    return Path(source).resolve().is_relative_to(folder.resolve())
