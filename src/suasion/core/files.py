"""Files that are either whole or not there, and names for their contents.

Every artefact is written beside its final place and moved over it in one step, so a reader (or a
run resumed after `kill -9`) never sees half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suasion.core.errors import DataError, StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system says when there is no room."""
PARTIAL = ".partial"
"""Suffix of what is being written; anything that carries it may be deleted."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system refusal while writing `path` into a `StorageError`."""
    try:
        yield
    except OSError as error:
        space = "free some space or " if error.errno in FULL else ""
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            f"{space}choose another --out; what was finished before is kept, and the same command "
            "continues from there",
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends without an error.

    The file is flushed to the disk before the move. On any error it is removed.

    Raises:
        StorageError: the disk refused.
    """
    partial = path.with_name(path.name + PARTIAL)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `path` when the block ends without an error.

    Raises:
        StorageError: the disk refused.
    """
    partial = path.with_name(path.name + PARTIAL)
    retired = path.with_name(path.name + ".old" + PARTIAL)
    with storage_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if path.exists():
                path.rename(retired)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing or not JSON; the message has the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON object as one line and push it to the operating system."""
    with storage_errors(path), path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file.

    A last line without its newline was cut off by a kill and is passed over.

    Raises:
        DataError: a complete line is not JSON; the message has its number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from None


def keep_json_lines(path: Path, keep: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file by the given objects, whole or not at all."""
    write_text(
        path, "".join(json.dumps(v, ensure_ascii=False, allow_nan=False) + "\n" for v in keep)
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_hashes(folder: Path, ignore: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path, sorted.

    Args:
        folder: Where to look.
        ignore: First path components that do not count (checkpoints, logs).
    """
    return {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ignore
    }
