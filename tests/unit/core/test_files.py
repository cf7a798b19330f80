"""Files are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from suasion.core import files
from suasion.core.errors import DataError, StorageError


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    """And not before."""
    path = tmp_path / "deep" / "file"
    with files.atomic_path(path) as partial:
        partial.write_text("new", "utf-8")
        assert not path.exists()
    assert path.read_text("utf-8") == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    """And no trace of the new one."""
    path = tmp_path / "file"
    path.write_text("old", "utf-8")

    def fail() -> None:
        with files.atomic_path(path) as partial:
            partial.write_text("new", "utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    """Files that were only in the old one are gone; what a kill left is no hindrance."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    (tmp_path / f"folder{files.PARTIAL}").mkdir()
    (tmp_path / f"folder{files.PARTIAL}" / "left").touch()
    with files.atomic_folder(path) as partial:
        (partial / "new").touch()
        assert (path / "old").exists()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    """As it was."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def fail() -> None:
        with files.atomic_folder(path) as partial:
            (partial / "new").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_refusal_of_the_system_names_the_path(tmp_path: Path) -> None:
    """A file is where a folder would have to be."""
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        files.write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_holds_no_infinities(tmp_path: Path, value: object) -> None:
    """They are no JSON, and the old file stays."""
    path = tmp_path / "file.json"
    files.write_json(path, {"a": "ä"})
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(path, value)
    assert files.read_json(path) == {"a": "ä"}


def test_bad_json_is_named_with_its_line(tmp_path: Path) -> None:
    """And a file that is not there by its name."""
    path = tmp_path / "file.json"
    path.write_text('{\n"a": 1,\n}', "utf-8")
    with pytest.raises(DataError, match=r"file\.json, line 3"):
        files.read_json(path)
    with pytest.raises(DataError, match="no such file"):
        files.read_json(tmp_path / "other")


def test_a_last_line_cut_off_is_passed_over(tmp_path: Path) -> None:
    """A kill cuts lines; a complete line that is not JSON is a mistake."""
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        files.append_json_line(path, {"n": number})
    with path.open("a", encoding="utf-8") as lines:
        lines.write('{"n": 3')
    assert [row["n"] for row in files.read_json_lines(path)] == [0, 1, 2]
    files.keep_json_lines(path, [{"n": 9}])
    assert json.loads(path.read_text("utf-8")) == {"n": 9}
    path.write_text('{"n": 1}\n{"n"\n', "utf-8")
    with pytest.raises(DataError, match="line 2"):
        list(files.read_json_lines(path))


def test_hashes_are_of_contents(tmp_path: Path) -> None:
    """Sorted by path; first components can be left out."""
    for name in ("b", "a/c", "logs/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.folder_hashes(tmp_path, ("logs",)) == {"a/c": empty, "b": empty}
    assert "logs/d" in files.folder_hashes(tmp_path)
