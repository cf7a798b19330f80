"""The three tables of a prepared folder: their columns, and how they are written."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from suasion.data.scoring import SPLITS

_PROVENANCE: Final = [("site", pa.string()), ("link", pa.string())]
SCHEMAS: Final[dict[str, pa.Schema]] = {
    "queries": pa.schema(
        [
            ("query", pa.string()),
            ("question_id", pa.int64()),
            *_PROVENANCE,
            ("author", pa.string()),
            ("licence", pa.string()),
        ]
    ),
    "answers": pa.schema(
        [
            ("query", pa.string()),
            ("response", pa.string()),
            ("score", pa.int64()),
            ("votes", pa.int64()),
            ("accepted", pa.bool_()),
            ("best", pa.bool_()),
            ("question_id", pa.int64()),
            ("answer_id", pa.int64()),
            *_PROVENANCE,
            ("author", pa.string()),
            ("licence", pa.string()),
        ]
    ),
    "pairs": pa.schema(
        [
            ("query", pa.string()),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("chosen_score", pa.int64()),
            ("rejected_score", pa.int64()),
            ("question_id", pa.int64()),
            ("chosen_id", pa.int64()),
            ("rejected_id", pa.int64()),
            ("chosen_author", pa.string()),
            ("rejected_author", pa.string()),
            *_PROVENANCE,
            ("licence", pa.string()),
        ]
    ),
}
"""Columns of `queries.parquet`, `answers.parquet` and `pairs.parquet`."""

_GROUP_ROWS: Final = 4096
_GROUP_CHARACTERS: Final = 8 << 20


class TableWriter:
    """A Parquet file written row by row; memory holds one row group.

    Groups are cut by the rows themselves and not by who delivers them, so the same rows always give
    the same bytes.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._rows.append(row)
        self.count += 1
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._rows) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()
        self._characters = 0


class SplitWriters:
    """The twelve tables of a prepared folder. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[tuple[str, str], TableWriter] = {}

    def __enter__(self) -> Self:
        for split in SPLITS:
            (self._folder / split).mkdir()
            for table, schema in SCHEMAS.items():
                path = self._folder / split / f"{table}.parquet"
                self._writers[split, table] = TableWriter(path, schema)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, split: str, table: str, row: dict[str, Any]) -> None:
        """Append one row to one table of one split."""
        self._writers[split, table].add(row)

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows per split and table."""
        return {
            split: {table: self._writers[split, table].count for table in SCHEMAS}
            for split in SPLITS
        }
