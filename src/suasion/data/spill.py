"""Posts and names put aside on disk, so that memory does not grow with the dump."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa

from suasion.core.errors import StorageError

POST_SCHEMA: Final = pa.schema(
    [
        ("rank", pa.int64()),
        ("question_id", pa.int64()),
        ("post_id", pa.int64()),
        ("is_question", pa.bool_()),
        ("votes", pa.int64()),
        ("accepted_id", pa.int64()),
        ("title", pa.string()),
        ("body", pa.string()),
        ("owner_id", pa.int64()),
        ("owner_name", pa.string()),
        ("licence", pa.string()),
        ("line", pa.int64()),
    ]
)
"""What is kept of a post. `rank` is the hash of its question; `line` is for error messages."""

_RANK_BITS: Final = 63
_ROW_OVERHEAD: Final = 300
"""Bytes that a row costs in memory beside its text; an estimate that decides when to write."""


class PostSpill:
    """Posts in bucket files, each holding the questions whose rank falls in one interval.

    Buckets are intervals, in order: reading them one after another and sorting each gives the same
    sequence whatever their number.

    Args:
        folder: Where the bucket files go; must exist.
        buckets: Number of buckets; one must fit in memory.
        buffer_bytes: How much text may wait in memory before it is written.
    """

    def __init__(self, folder: Path, *, buckets: int, buffer_bytes: int = 64 << 20) -> None:
        self._folder = folder
        self._rows: list[list[dict[str, Any]]] = [[] for _ in range(buckets)]
        self._buffer_bytes = buffer_bytes
        self._waiting = 0

    def add(self, row: dict[str, Any]) -> None:
        """Put one post (a row of `POST_SCHEMA`) aside."""
        self._rows[row["rank"] * len(self._rows) >> _RANK_BITS].append(row)
        self._waiting += len(row["body"]) + len(row["title"]) + _ROW_OVERHEAD
        if self._waiting > self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A file is open only while it is written: buckets may be thousands."""
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        for number, rows in enumerate(self._rows):
            if rows:
                table = pa.Table.from_pylist(rows, schema=POST_SCHEMA)
                with (
                    self._path(number).open("ab") as file,
                    pa.ipc.new_stream(file, POST_SCHEMA, options=options) as stream,
                ):
                    stream.write_table(table)
                rows.clear()
        self._waiting = 0

    def buckets(self) -> Iterator[list[dict[str, Any]]]:
        """Yield each bucket's posts, sorted by question, the question first, then answers by id.

        A bucket's file is removed once read.
        """
        self.flush()
        for number in range(len(self._rows)):
            path = self._path(number)
            if not path.exists():
                continue
            rows: list[dict[str, Any]] = []
            with path.open("rb") as file:
                end = path.stat().st_size
                while file.tell() < end:
                    with pa.ipc.open_stream(file) as stream:
                        rows.extend(stream.read_all().to_pylist())
            path.unlink()
            rows.sort(
                key=lambda r: (r["rank"], r["question_id"], not r["is_question"], r["post_id"])
            )
            yield rows

    def _path(self, number: int) -> Path:
        return self._folder / f"posts-{number:05d}.arrow"


class IdSet:
    """A set of non-negative integers that costs about a bit each when they are dense."""

    _PAGE_BITS: Final = 12

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Add `number`; False if it was in the set already."""
        page = self._pages.get(number >> self._PAGE_BITS)
        if page is None:
            page = self._pages[number >> self._PAGE_BITS] = bytearray(1 << (self._PAGE_BITS - 3))
        byte, bit = (number & ((1 << self._PAGE_BITS) - 1)) >> 3, 1 << (number & 7)
        if page[byte] & bit:
            return False
        page[byte] |= bit
        return True


class NameStore:
    """Display names by user id, on disk. Use as a context manager."""

    _BATCH: Final = 500

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._database = sqlite3.connect(self._path)
        # The file is temporary: nothing is lost if it is, so nothing waits for the disk.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._database.close()

    def fill(self, users: Iterable[tuple[int, str]]) -> None:
        """Store `(id, name)` rows; of two rows with one id the last counts.

        Raises:
            StorageError: the disk refused.
        """
        try:
            self._database.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", users)
            self._database.commit()
        except sqlite3.Error as error:
            raise StorageError(f"cannot write {self._path}: {error}", "free some space") from error

    def names(self, ids: Iterable[int]) -> dict[int, str]:
        """Names of those of `ids` that are known."""
        wanted = sorted(set(ids))
        found: dict[int, str] = {}
        for start in range(0, len(wanted), self._BATCH):
            batch = wanted[start : start + self._BATCH]
            marks = ",".join("?" * len(batch))
            # Only question marks enter the statement; the ids are bound.
            query = f"SELECT id, name FROM users WHERE id IN ({marks})"  # noqa: S608
            found.update(self._database.execute(query, batch).fetchall())
        return found
