"""Rows of a Stack Exchange dump file, one at a time, whatever the file's size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from lxml import etree

from suasion.core.errors import DataError

_CHUNK: Final = 1 << 18
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}", re.ASCII)
# What XML 1.0 forbids even as a character reference; dumps contain it, parsers stop at it.
_FORBIDDEN: Final = re.compile(
    rb"&#(?:[xX]0*(?:[0-8bBcCeEfF]|1[0-9a-fA-F]|[dD][89a-fA-F][0-9a-fA-F]{2}|[fF]{3}[eEfF])"
    rb"|0*(?:[0-8]|1[124-9]|2[0-9]|3[01]));"
)
_CONTROL: Final = bytes(c for c in range(32) if c not in b"\t\n\r")
_BLANKS: Final = bytes.maketrans(_CONTROL, b" " * len(_CONTROL))
_REFERENCE_LENGTH: Final = 16
"""Longest tail held back so that a character reference is never cut in two."""


class Row:
    """One `<row>`: its attributes, and where it stands."""

    __slots__ = ("attributes", "line", "path")

    def __init__(self, attributes: dict[str, str], path: Path, line: int) -> None:
        self.attributes = attributes
        self.path = path
        self.line = line

    def text(self, name: str) -> str | None:
        """An attribute, or None."""
        return self.attributes.get(name)

    def integer(self, name: str) -> int:
        """An attribute that must be there and be an integer.

        Raises:
            DataError: it is not; the message has file, line, row id and attribute.
        """
        value = self.attributes.get(name)
        if value is None:
            raise self.error(f"has no {name}")
        if not _INTEGER.fullmatch(value):
            raise self.error(
                f"has {name}={value[:40]!r}, which is not an integer of up to 18 digits"
            )
        return int(value)

    def optional_integer(self, name: str) -> int | None:
        """An attribute that, when it is there, must be an integer."""
        return self.integer(name) if self.attributes.get(name) else None

    def error(self, what: str) -> DataError:
        """A `DataError` about this row."""
        row = f"row Id={self.attributes['Id'][:40]!r}" if "Id" in self.attributes else "this row"
        return DataError(
            f"{self.path}, line {self.line}: {row} {what}",
            "correct or remove the row, or take the file from the dump again",
        )


class _CleanReader:
    """A binary file without the characters that XML forbids. Lines stay where they were."""

    def __init__(self, file: IO[bytes], path: Path, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._path = path
        self._on_bytes = on_bytes
        self._held = b""

    def read(self, _size: int = -1) -> bytes:
        chunk = self._file.read(_CHUNK)
        self._on_bytes(len(chunk))
        data = self._held + chunk
        # A dump declares no document type; one that does can make a parser eat memory or files.
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise DataError(
                f"{self._path}: declares a document type, which no Stack Exchange dump does",
                "take the file from the dump again",
            )
        cut = len(data)
        if chunk:
            cut = max(data.rfind(b"&", -_REFERENCE_LENGTH), data.rfind(b"<", -_REFERENCE_LENGTH))
            cut = len(data) if cut < 0 else cut
        data, self._held = data[:cut], data[cut:]
        data = _FORBIDDEN.sub(b" ", data.translate(_BLANKS))
        # An empty read means the end of the file, and here it may only mean that all was held.
        return data if data or not chunk else self.read()


def rows(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Row]:
    """Yield the rows of a dump file in constant memory.

    A byte-order mark and mixed line ends are accepted; characters that XML forbids become spaces;
    entities are not resolved and nothing is fetched.

    Args:
        path: `Posts.xml`, `Users.xml` or `Votes.xml`.
        on_bytes: Called with the number of bytes just read.

    Raises:
        DataError: the file cannot be read, is cut off or is not XML; the message has the line.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    with file:
        parsed = etree.iterparse(
            _CleanReader(file, path, on_bytes),
            tag="row",
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=True,
            encoding="utf-8",
        )
        try:
            for _, element in parsed:
                yield Row(dict(element.attrib), path, element.sourceline or 0)
                # The parser keeps what it has read as a tree: drop the rows before this one.
                parent = element.getparent()
                while parent is not None and element.getprevious() is not None:
                    del parent[0]
        except etree.XMLSyntaxError as error:
            raise DataError(
                f"{path}, line {error.lineno}: not well-formed XML ({error.msg})",
                "the file is damaged or was cut off: unpack or download it again",
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
