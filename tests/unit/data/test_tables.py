"""Tables of users: four formats, and every fault named with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from suasion.core.errors import ConfigError, DataError
from suasion.data.tables import read_table

TEXTS = {"query": str, "chosen": str, "rejected": str}
ROWS: list[dict[str, Any]] = [
    {"query": f"q{n}, é\n", "chosen": f'"c{n}"', "rejected": "r", "weight": n / 2, "id": n}
    for n in range(2500)
]


def to_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path)


def to_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def to_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON array."""
    path.write_text(json.dumps(rows))


def to_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write CSV with a byte-order mark."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".parquet": to_parquet,
    ".jsonl": to_json_lines,
    ".json": to_json,
    ".csv": to_csv,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """Four formats, one result, with and without a limit."""
    path = tmp_path / f"table{suffix}"
    FORMATS[suffix](path, ROWS)
    columns = {"query": str, "chosen": str, "weight": float, "id": int}
    wanted = [{name: row[name] for name in columns} for row in ROWS]
    assert read_table(path, columns) == wanted
    assert read_table(path, columns, limit=1300) == wanted[:1300]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("chosen", "", "is blank|is empty"), ("chosen", " \n", "is blank"), ("id", "x", "is a str")],
)
def test_a_bad_value_is_named_with_its_place(
    tmp_path: Path, suffix: str, name: str, value: str, message: str
) -> None:
    """Row, column and, where there are lines, line."""
    path = tmp_path / f"table{suffix}"
    rows = [{**row, "id": str(row["id"])} if name == "id" else dict(row) for row in ROWS[:1200]]
    if name == "id" and suffix != ".csv":
        rows = rows[1033:]
        for row in rows[:-1]:
            row["id"] = "1"
    position = len(rows) - 1
    rows[position][name] = value
    FORMATS[suffix](path, rows)
    kinds = {"chosen": str} if name == "chosen" else {"id": int}
    if name == "id" and suffix != ".csv":
        position = 0  # the whole column is text
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, kinds)
    assert f"row {position + 1}, column '{name}'" in str(caught.value)
    assert str(path) in str(caught.value)
    if suffix == ".jsonl":
        assert f"line {position + 1}," in str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_column_suggests_the_nearest(tmp_path: Path, suffix: str) -> None:
    """A misspelt column is recognised."""
    path = tmp_path / f"table{suffix}"
    FORMATS[suffix](path, [{"query": "a", "choosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="no column 'chosen'") as caught:
        read_table(path, TEXTS)
    assert "did you mean 'choosen'?" in caught.value.fix


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".jsonl", '{"id": 1}\n{"id": \n', r"line 2: not valid JSON"),
        (".jsonl", '{"id": 1}\n\n[1]\n', r"line 3: holds a list where an object"),
        (".jsonl", '{"id": 1}\n\n{"id": true}\n', r"line 3, row 2, column 'id': is a bool"),
        (".jsonl", '{"id": 1}\n{"id": null}\n', r"line 2, row 2, column 'id': is empty"),
        (".jsonl", '{"id": 1.0}\n', r"is a float"),
        (".jsonl", "\n \n", r"holds no rows"),
        (".json", "[]", r"holds no rows"),
        (".json", '{"id": 1}', r"holds a dict where an array"),
        (".json", "[1]", r"row 1: holds a int where an object"),
        (".json", '[{"id": 1},\n{"id"}]', r"line 2: not valid JSON"),
        (".csv", "id\n", r"holds no rows"),
        (".csv", "", r"no column 'id'"),
        (".csv", "id,b\n1,2,3\n", r"line 2 \(row 1\): more cells"),
        (".csv", 'id,b\n1,"2\n', r"not valid CSV"),
        (".csv", "b,id\n1\n", r"line 2, row 1, column 'id': is empty"),
        (".parquet", "PAR1 but not really", r"not a readable Parquet file"),
        (".txt", "id\n1\n", r"unknown kind of table '\.txt'"),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, suffix: str, content: str, message: str
) -> None:
    """Malformed content of each format."""
    path = tmp_path / f"table{suffix}"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, {"id": int})
    assert str(path) in str(caught.value)


def test_other_faults(tmp_path: Path) -> None:
    """Missing files, folders, encodings, NaN, a limit of nothing."""
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv", TEXTS)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path / "folder.json", TEXTS)
    for suffix in (".jsonl", ".csv", ".json"):
        path = tmp_path / f"latin{suffix}"
        path.write_bytes(b'id\n"\xe9"\n')
        with pytest.raises(DataError, match="not UTF-8"):
            read_table(path, {"id": str})
    path = tmp_path / "nan.jsonl"
    path.write_text('{"id": NaN}\n')
    with pytest.raises(DataError, match="not a finite number"):
        read_table(path, {"id": float})
    with pytest.raises(ConfigError, match="limit of 0"):
        read_table(path, {"id": float}, limit=0)


def test_a_limit_stops_before_what_is_bad_behind_it(tmp_path: Path) -> None:
    """Rows beyond the limit are not even read."""
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": 1}\nnot json\n')
    assert read_table(path, {"id": int}, limit=1) == [{"id": 1}]


@pytest.mark.real_data
def test_real_dirty_data_is_refused_with_its_row(real_data: Path) -> None:
    """Real data with faulty fields is refused by row and column."""
    path = real_data / "preferences" / "pandalm" / "testset-v1.json"
    with pytest.raises(DataError, match=r"row \d+, column 'response\d': is "):
        read_table(path, {"instruction": str, "response1": str, "response2": str})
