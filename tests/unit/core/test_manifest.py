"""When a stage is done, when it goes on, when it starts anew, and what it refuses to delete."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from suasion.core import manifest as m
from suasion.core.errors import ConfigError, StorageError
from suasion.core.files import PARTIAL

CONFIG = {"rate": 0.1, "inner": {"kind": "x", "list": [1, 2]}, "data": "in.txt"}


def describe(source: Path, stage: str = "sft", seed: int = 1, **changes: Any) -> m.Manifest:
    """A stage with one input."""
    return m.begin(stage, {**CONFIG, "data": str(source), **changes}, {"data": str(source)}, seed)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input file."""
    path = tmp_path / "in.txt"
    path.write_text("content", "utf-8")
    return path


def finish(folder: Path, manifest: m.Manifest) -> dict[str, Any]:
    """Claim, write one file, complete."""
    assert not m.claim(folder, manifest)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state").touch()
    (folder / f"half{PARTIAL}").touch()
    (folder / "result").write_text("result", "utf-8")
    return m.complete(folder, manifest, {"loss": 1.5, "counts": {"rows": 3}}, 1.23456)


def test_the_fingerprint_is_of_what_decides_the_result(source: Path, tmp_path: Path) -> None:
    """Configuration, seed, name and the inputs' contents; not where they are."""
    base = describe(source).fingerprint
    elsewhere = tmp_path / "other.txt"
    elsewhere.write_text("content", "utf-8")
    assert describe(elsewhere).fingerprint == base
    assert describe(source, rate=0.2).fingerprint != base
    assert describe(source, seed=2).fingerprint != base
    assert describe(source, stage="ppo").fingerprint != base
    source.write_text("other", "utf-8")
    assert describe(source).fingerprint != base


def test_contents_behind_a_name_count(tmp_path: Path) -> None:
    """A reward in a file, a pipeline's folder; a bare name is only a name."""
    file = tmp_path / "judge.py"
    file.write_text("1", "utf-8")
    one = m.content_hash(f"{file}:score")
    pipeline = m.content_hash(f"pipeline:{tmp_path}#good")
    file.write_text("2", "utf-8")
    assert m.content_hash(f"{file}:score") != one
    assert m.content_hash(f"{file}:score") != m.content_hash(f"{file}:other")
    assert m.content_hash(f"pipeline:{tmp_path}#good") != pipeline
    assert m.content_hash("gpt2") == "name:gpt2"
    assert m.content_hash("package.module:score") == "name:package.module:score"


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    """The second one is refused until the first one has left."""
    refused = pytest.raises(ConfigError, match="being written by another")
    with m.alone_in(tmp_path), refused, m.alone_in(tmp_path):
        pass
    with m.alone_in(tmp_path), m.alone_in(tmp_path / "not there"):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is used all the same."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with m.alone_in(tmp_path), m.alone_in(tmp_path):
        pass


def test_a_finished_stage_is_recognised(source: Path, tmp_path: Path) -> None:
    """Its scratch files are gone, and the manifest holds what came out."""
    folder, manifest = tmp_path / "out", describe(source)
    stored = finish(folder, manifest)
    assert m.finished(folder, manifest) == stored
    assert {path.name for path in folder.iterdir()} == {"result", "manifest.json"}
    assert stored["result"] == {"loss": 1.5}
    assert stored["counts"] == {"rows": 3}
    assert stored["seconds"] == 1.235
    assert m.changed_keys(folder, manifest) == [
        "its files were changed, or another version made it"
    ]


def test_a_changed_or_missing_output_is_noticed(source: Path, tmp_path: Path) -> None:
    """A finished stage whose files were touched is not finished."""
    folder, manifest = tmp_path / "out", describe(source)
    finish(folder, manifest)
    (folder / "result").write_text("resulT", "utf-8")
    assert m.finished(folder, manifest) is None
    (folder / "result").unlink()
    assert m.finished(folder, manifest) is None


def test_what_changed_is_named(source: Path, tmp_path: Path) -> None:
    """Keys with both values, inputs, and the seed."""
    folder = tmp_path / "out"
    finish(folder, describe(source))
    source.write_text("other", "utf-8")
    now = describe(source, seed=2, rate=0.2, inner={"kind": "y", "list": [1, 2]})
    assert m.finished(folder, now) is None
    assert m.changed_keys(folder, now) == [
        "inner.kind: '\"x\"' -> '\"y\"'",
        "rate: '0.1' -> '0.2'",
        "data: other content",
        "seed: 1 -> 2",
    ]
    assert m.changed_keys(tmp_path / "nothing", now) == []


def test_a_begun_stage_goes_on_and_another_starts_anew(source: Path, tmp_path: Path) -> None:
    """The same fingerprint keeps the files; another one of the same stage removes them."""
    folder, manifest = tmp_path / "out", describe(source)
    assert not m.claim(folder, manifest)
    (folder / "checkpoint").touch()
    assert m.claim(folder, manifest)
    assert (folder / "checkpoint").exists()
    assert not m.claim(folder, describe(source, rate=0.2))
    assert not (folder / "checkpoint").exists()


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "begun.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"name": "an app"}'])
def test_files_of_others_are_never_deleted(
    source: Path, tmp_path: Path, name: str, content: str
) -> None:
    """Whatever they are called."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / name).write_text(content, "utf-8")
    assert m.finished(folder, describe(source)) is None
    assert m.changed_keys(folder, describe(source)) == []
    with pytest.raises(ConfigError, match="did not write"):
        m.claim(folder, describe(source))
    assert (folder / name).read_text("utf-8") == content


@pytest.mark.parametrize("done", [True, False])
def test_another_stage_is_not_replaced(source: Path, tmp_path: Path, done: bool) -> None:  # noqa: FBT001
    """Finished or begun."""
    folder = tmp_path / "out"
    if done:
        finish(folder, describe(source))
    else:
        m.claim(folder, describe(source))
    with pytest.raises(ConfigError, match="holds the stage sft, and ppo would replace it"):
        m.claim(folder, describe(source, stage="ppo"))


def test_an_abandoned_stage_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """Unless it had written something to go on from."""
    folder = tmp_path / "out"
    m.claim(folder, describe(source))
    (folder / "scratch").mkdir()
    m.abandon(folder)
    assert not folder.exists()
    m.claim(folder, describe(source))
    (folder / "metrics.jsonl").touch()
    m.abandon(folder)
    assert m.claim(folder, describe(source))


def test_a_folder_that_cannot_be_made(source: Path) -> None:
    """A file is in the way."""
    with pytest.raises(StorageError, match="cannot write"):
        m.claim(source / "out", describe(source))


def test_the_commit_is_of_the_sources_or_unknown() -> None:
    """Forty hexadecimal digits, or nothing for an installed package."""
    found = m.commit()
    assert found is None or (len(found) == 40 and int(found, 16))
    assert json.dumps(m.versions())


def test_a_stage_waits_while_it_is_made_anew(source: Path, tmp_path: Path) -> None:
    """It comes back if nothing was written, or by its own command; else it goes at the end."""
    folder, waiting = tmp_path / "out", tmp_path / "out.before"
    manifest, other = describe(source), describe(source, rate=0.2)
    stored = finish(folder, manifest)
    # The new one fails before it has written anything.
    assert not m.claim(folder, other)
    assert (waiting / "result").is_file()
    m.abandon(folder)
    assert m.finished(folder, manifest) == stored
    assert not waiting.exists()
    # It is interrupted, and the old command runs again.
    m.claim(folder, other)
    (folder / "half").touch()
    m.abandon(folder)
    assert m.finished(folder, manifest) is None
    m.take_back(folder, manifest)
    assert m.finished(folder, manifest) == stored
    # A third one takes the place of what is begun, and what is finished goes on waiting.
    m.claim(folder, other)
    assert not m.claim(folder, describe(source, rate=0.3))
    assert m.finished(waiting, manifest) == stored
    m.complete(folder, describe(source, rate=0.3), {}, 1.0)
    assert not waiting.exists()
    m.take_back(folder, manifest)
    assert m.finished(folder, manifest) is None


def test_what_is_begun_waits_too(source: Path, tmp_path: Path) -> None:
    """Its checkpoints may be of hours."""
    folder, manifest = tmp_path / "out", describe(source)
    m.claim(folder, manifest)
    (folder / "checkpoint").touch()
    m.claim(folder, describe(source, rate=0.2))
    m.abandon(folder)
    assert (folder / "checkpoint").is_file()
    assert m.claim(folder, manifest), "it goes on"


def test_nothing_waits_where_nothing_was(source: Path, tmp_path: Path) -> None:
    """An empty folder leaves none beside it, nor does another's there matter."""
    for name in ("empty", "new"):
        folder, waiting = tmp_path / name, tmp_path / f"{name}.before"
        (folder if name == "empty" else waiting).mkdir()
        assert not m.claim(folder, describe(source))
        assert waiting.exists() is (name == "new")


def test_another_s_folder_is_not_waited_in(source: Path, tmp_path: Path) -> None:
    """Nothing is overwritten that suasion did not write."""
    folder = tmp_path / "out"
    finish(folder, describe(source))
    (tmp_path / "out.before").mkdir()
    with pytest.raises(ConfigError, match="did not write"):
        m.claim(folder, describe(source, rate=0.2))
    assert (folder / "result").is_file()
