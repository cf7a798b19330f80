"""Rows from Parquet, JSON lines, JSON or CSV, each checked before anything is trained on it."""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from suasion.core.errors import ConfigError, DataError
from suasion.core.files import read_json

Raw = Mapping[str, Any]
_BATCH_ROWS: Final = 1024
_LONGEST_CELL: Final = 1 << 24
"""Characters that one cell of a CSV file may hold; the standard library's own limit is 128 Ki."""
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A row as it was read, and where: `line` is None when the format has no lines."""

    number: int
    line: int | None
    values: Raw


def read_table(
    path: Path, columns: Mapping[str, type], limit: int | None = None
) -> list[dict[str, Any]]:
    """Read the named columns of a table and check every value.

    Text must not be blank. A `float` column takes whole numbers too and refuses NaN and infinity;
    an `int` column refuses booleans. In CSV, where all is text, numbers and true/false are parsed.

    Args:
        path: A `.parquet`, `.jsonl`, `.json` (an array of objects) or `.csv` file.
        columns: Type by column name; `str`, `int`, `float`, `bool` or any class. Other columns
            are not read.
        limit: Read no more rows than this.

    Returns:
        Rows in file order, each with exactly the named columns.

    Raises:
        DataError: file, column or value is wrong; the message names file, row (from 1), line where
            there are lines, and column.
        ConfigError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} rows for {path}", "give 1 or more, or none at all")
    readers: dict[str, Callable[[Path, Mapping[str, type]], Iterator[_Numbered]]] = {
        ".parquet": _parquet,
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
    }
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path}: unknown kind of table {path.suffix!r}",
            f"give a file that ends in {', '.join(readers)}",
        )
    if not path.is_file():
        raise DataError(
            f"{path} is a folder" if path.is_dir() else f"no such file: {path}",
            "give the path of one table",
        )
    try:
        numbered = readers[path.suffix.lower()](path, columns)
        rows = [_checked(path, row, columns) for row in islice(numbered, limit)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason})", "save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path} holds no rows", "nothing can be learned from an empty table")
    return rows


def _parquet(path: Path, columns: Mapping[str, type]) -> Iterator[_Numbered]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _require(str(path), columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                for values in batch.to_pylist():
                    number += 1
                    yield _Numbered(number, None, values)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})",
            "write or download it again",
        ) from None


def _json_lines(path: Path, columns: Mapping[str, type]) -> Iterator[_Numbered]:
    number = 0
    with path.open(encoding="utf-8-sig") as lines:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            number += 1
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {line}: not valid JSON ({error})") from None
            where = f"{path}, line {line}"
            yield _Numbered(number, line, _object(where, values, columns))


def _json(path: Path, columns: Mapping[str, type]) -> Iterator[_Numbered]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(
            f"{path}: holds a {type(content).__name__} where an array of objects is needed",
            "write the rows as [{...}, {...}], or one object per line in a .jsonl file",
        )
    for number, values in enumerate(content, start=1):
        yield _Numbered(number, None, _object(f"{path}, row {number}", values, columns))


def _csv(path: Path, columns: Mapping[str, type]) -> Iterator[_Numbered]:
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            _require(str(path), columns, list(reader.fieldnames or ()))
            for number, values in enumerate(reader, start=1):
                where = f"{path}, line {reader.line_num} (row {number})"
                if None in values:
                    raise DataError(
                        f"{where}: more cells than the header has columns",
                        "put quotes around cells that hold commas",
                    )
                parsed = {n: _parse(values[n], kind) for n, kind in columns.items()}
                yield _Numbered(number, reader.line_num, parsed)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not valid CSV ({error})",
                "mend the quotes, or use JSON lines or Parquet",
            ) from None


def _parse(cell: str | None, kind: type) -> Any:
    """A CSV cell as `kind`; a cell that is not one stays text, for the check to name."""
    if cell is None:
        return None
    text = cell.strip()
    if kind is int and _INTEGER.fullmatch(text):
        return int(text)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return cell
    return cell


def _object(where: str, values: Any, columns: Mapping[str, type]) -> Raw:
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: holds a {type(values).__name__} where an object is needed",
            f"write an object with {', '.join(columns)}",
        )
    _require(where, columns, list(values))
    return values


def _require(where: str, columns: Mapping[str, type], present: list[str]) -> None:
    for name in columns:
        if name in present:
            continue
        near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
        shown = ", ".join(present[:20]) or "none"
        raise DataError(
            f"{where}: no column {name!r} (columns: {shown})",
            f"did you mean {near[0]!r}? Rename it to {name!r}"
            if near
            else f"add or rename a column to {name!r}",
        )


def _checked(path: Path, row: _Numbered, columns: Mapping[str, type]) -> dict[str, Any]:
    checked = {}
    for name, kind in columns.items():
        value = row.values[name]
        wrong = _fault(value, kind)
        if wrong:
            line = "" if row.line is None else f"line {row.line}, "
            raise DataError(
                f"{path}, {line}row {row.number}, column {name!r}: {wrong}",
                "correct or remove the row",
            )
        checked[name] = float(value) if kind is float else value
    return checked


def _fault(value: Any, kind: type) -> str:
    """What is wrong with a value, or nothing."""
    if value is None:
        return "is empty"
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and not math.isfinite(value):
            return f"is {value}, which is not a finite number"
    else:
        fits = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
    if not fits:
        return f"is a {type(value).__name__} ({str(value)[:40]!r}), not a {kind.__name__}"
    return "is blank" if isinstance(value, str) and not value.strip() else ""
