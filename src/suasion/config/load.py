"""Text in, validated dataclasses out; every mistake at once, each with its path.

One validator for YAML, recipe overrides and stage options: pydantic reads the same dataclasses, so
a wrong type, a value out of range and a misspelled key are reported alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from suasion.core.errors import ConfigError

Config = TypeVar("Config")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such recipe: {path}", "check the path; see recipes/") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file ({error})", "see recipes/") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of keys, "
            + ("and this file is empty" if value is None else f"not {type(value).__name__}"),
            "see recipes/",
        )
    return value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--ppo.learning_rate 1e-5 --seed=3` into a nested mapping.

    Values stay text, and the validator turns them into what their option is: a prompt of `42` or
    `Rice: how long?` is a text and no number or mapping. Only `null`, `[...]` and `{...}` are read
    as YAML.

    Raises:
        ConfigError: an argument is not of that form.
    """
    nested: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(
                f"unexpected argument {flag!r}", "overrides look like --key.key value"
            )
        key, equals, text = flag[2:].partition("=")
        texts = [text] if equals else []
        while not equals and pending and not pending[0].startswith("--"):
            texts.append(pending.pop(0))
        if not texts:
            raise ConfigError(f"--{key} needs a value", f"write --{key} VALUE")
        *path, last = key.replace("-", "_").split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{key}: {part} was already given a plain value")
        values = [_plain(one) for one in texts]
        inner[last] = values[0] if len(values) == 1 else values
    return nested


def _plain(text: str) -> Any:
    if text not in ("null", "~") and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = value
    return result


def validate(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build `kind` from plain values.

    Args:
        kind: A configuration dataclass.
        values: Nested plain values, as read from YAML.
        source: Named in the message: a file, or "options".

    Raises:
        ConfigError: lists every unknown key (with the nearest valid name), missing key, wrong type
            and value out of range, each with its path.
    """
    try:
        return TypeAdapter(kind).validate_python(_tuples(values))
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors(include_url=False)]
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    listed = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
    raise ConfigError(f"{count} in {source}:\n{listed}")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    return value


def _explain(kind: type[Any], problem: Any) -> str:
    location = [part for part in problem["loc"] if not _is_union_branch(part)]
    path = ".".join(str(part) for part in location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = _keys(kind, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"valid keys: {', '.join(valid)}"
        return f"{path}: unknown key; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; give it in the recipe or as --{path}"
    return f"{path}: {problem['msg']} (got {problem['input']!r})"


def _is_union_branch(part: object) -> bool:
    """Pydantic puts the name of the tried union branch into the location; users never wrote it."""
    return isinstance(part, str) and (part.endswith("Config") or "[" in part or part in _SCALARS)


_SCALARS = {"int", "float", "str", "bool", "constrained-int", "constrained-float"}


def _keys(kind: type[Any], path: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass found by following `path` from `kind`."""
    for part in path:
        hint = get_type_hints(kind).get(str(part))
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        inner = [option for option in options if is_dataclass(option)]
        if not inner:
            return []
        kind = inner[0]  # type: ignore[assignment]
    return [entry.name for entry in fields(kind)]
