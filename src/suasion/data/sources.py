"""What stages read: a prepared folder by its parts, or a user's own table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.core.errors import DataError
from suasion.data.codec import Codec, TooLong
from suasion.data.tables import read_table

ANSWER = {"query": str, "response": str}
PAIR = {"query": str, "chosen": str, "rejected": str}
QUERY = {"query": str}


@dataclass(frozen=True)
class Source:
    """A prepared folder or a table, as named in a recipe."""

    path: Path
    """A folder written by `prepare`, or a file."""

    @property
    def prepared(self) -> bool:
        """Whether this is a folder with the four splits."""
        return self.path.is_dir()

    def file(self, split: str, kind: str) -> Path:
        """The file that holds `kind` (queries, answers, pairs) of `split`; a table is all of them.

        Raises:
            DataError: neither is there.
        """
        if not self.prepared:
            if not self.path.is_file():
                raise DataError(f"no such data: {self.path}", "check the path")
            return self.path
        found = self.path / split / f"{kind}.parquet"
        if not found.is_file():
            raise DataError(
                f"{self.path} is not a prepared folder: it has no {split}/{kind}.parquet",
                "make one with: suasion prepare stackexchange DUMP_DIR --out DIR",
            )
        return found

    def answers(self, split: str, *, best: bool, limit: int | None = None) -> list[dict[str, Any]]:
        """Questions with an answer each; only the best of each question if `best`."""
        path = self.file(split, "answers")
        if not (self.prepared and best):
            return read_table(path, ANSWER, limit=limit)
        rows = [row for row in read_table(path, {**ANSWER, "best": bool}) if row["best"]]
        return rows[:limit]

    def pairs(self, split: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Pairs of answers, the preferred one under `chosen`."""
        return read_table(self.file(split, "pairs"), PAIR, limit=limit)

    def queries(self, split: str, limit: int | None = None) -> list[str]:
        """Prompts."""
        rows = read_table(self.file(split, "queries"), QUERY, limit=limit)
        return [row["query"] for row in rows]


def documents(codec: Codec, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Whole question-answer texts as tokens, each ended."""
    return [codec.document_ids(row["query"], row["response"]) for row in rows]


def fitting(
    queries: Sequence[str], codec: Codec, room: int, too_long: TooLong, where: str
) -> list[str]:
    """The queries whose prompts have at most `room` tokens; see `Codec.fit_query`.

    Raises:
        DataError: one is too long and `too_long` is "error"; or none is left.
    """
    kept = [
        fit
        for row, query in enumerate(queries)
        if (fit := codec.fit_query(query, room, too_long, f"{where}, row {row}")) is not None
    ]
    if not kept:
        raise DataError(
            f"{where}: all {len(queries)} prompts have over {room} tokens",
            "set too_long to cut, or take a model with a longer context",
        )
    return kept


def spread(rows: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` rows, evenly spaced over all of them: no split order decides."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[index * len(rows) // limit] for index in range(limit)]


def raw_texts(path: Path, template_text: Callable[[str, str], str]) -> list[str]:
    """Raw documents of a .txt file, a folder of them, or a prepared folder's supervised part.

    Args:
        path: Where to look.
        template_text: Turns a question and an answer into one text.

    Raises:
        DataError: there is no text.
    """
    if path.is_dir() and (path / "supervised").is_dir():
        rows = read_table(path / "supervised" / "answers.parquet", ANSWER)
        return [template_text(row["query"], row["response"]) for row in rows]
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise DataError(f"no such text: {file}", "check pretrain.text") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from None
        if text:
            texts.append(text)
    if not texts:
        raise DataError(f"{path} has no text", "give a .txt file, a folder of them, or a dump")
    return texts
