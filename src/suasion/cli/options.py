"""Options of a stage called on its own: its configuration, plus where to write and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Generic, TypeVar

from suasion.config.load import parse_overrides, validate
from suasion.config.schema import Natural, Positive
from suasion.core.errors import ConfigError

Config = TypeVar("Config")


@dataclass(frozen=True)
class StageCall(Generic[Config]):
    """A stage called on its own."""

    config: Config
    """Its options."""
    out: str
    """Folder to write."""
    seed: int
    """Root seed."""
    threads: int | None
    """Processor threads."""


def parse_stage(kind: type[Config], command: str, arguments: Sequence[str]) -> StageCall[Config]:
    """Parse and validate the options of a stage.

    Raises:
        ConfigError: lists every mistake.
        SystemExit: help was asked for and printed.
    """
    if any(word in ("-h", "--help") for word in arguments):
        show_help(_with_out(kind), command)
        raise SystemExit(0)
    whole: Any = validate(_with_out(kind), parse_overrides(arguments), "the options")
    config = kind(**{entry.name: getattr(whole, entry.name) for entry in fields(kind)})  # type: ignore[arg-type]
    return StageCall(config, whole.out, whole.seed, whole.threads)


def need(command: str, **values: object) -> None:
    """Refuse a stage called alone without one of its inputs.

    Raises:
        ConfigError: names all that are missing.
    """
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"suasion {command} needs {', '.join(missing)}", f"suasion {command} -h")


def show_help(kind: type[Any], command: str) -> None:
    """Print every option of a configuration class with type, default and meaning."""
    import tyro

    tyro.cli(kind, prog=f"suasion {command}", args=["--help"], use_underscores=True)


def _with_out(kind: type[Any]) -> type[Any]:
    """The class with --out, --seed and --threads in front."""
    return make_dataclass(
        kind.__name__,
        [
            ("out", str),
            ("seed", Natural, field(default=1)),
            ("threads", Positive | None, field(default=None)),
        ],
        bases=(kind,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": kind.__doc__},
    )
