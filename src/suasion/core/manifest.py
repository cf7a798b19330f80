"""A stage's folder and the manifest that says what it was made from.

A finished stage has `manifest.json`; one that was begun has `begun.json`, written before anything
else. Both carry a fingerprint of configuration, inputs by content, seed and version: a finished
stage whose fingerprint still holds is skipped, a begun one is continued, anything else starts anew.
What was there then waits in a folder beside it, until the new one is finished or has failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import suasion
from suasion.core.errors import ConfigError, DataError
from suasion.core.files import (
    PARTIAL,
    file_hash,
    folder_hashes,
    read_json,
    storage_errors,
    write_json,
)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
BEGUN = "begun.json"
ARITHMETIC = "arithmetic.json"
"""Where a stage that trains keeps the arithmetic it chose."""
BEFORE = ".before"
"""Ends the name of the folder in which a stage waits that is made anew."""
SCRATCH = ("checkpoints", "scratch", "tracking")
"""Folders of a stage that are not part of its result; the first two go when it is finished."""


@dataclass(frozen=True)
class Manifest:
    """What a stage was made from, and what it made."""

    stage: str
    """Its name."""
    fingerprint: str
    """SHA-256 of everything that decides the result."""
    config: Mapping[str, Any]
    """Resolved configuration."""
    inputs: Mapping[str, str]
    """Content hash of each input, by its name in the configuration."""
    seed: int
    """Root seed."""


def begin(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, str | None], seed: int
) -> Manifest:
    """Describe a stage about to run. Paths in `config` do not count, their contents do."""
    hashes = {name: content_hash(source) for name, source in inputs.items() if source}
    decided = {key: value for key, value in config.items() if key not in inputs}
    parts = [stage, decided, hashes, seed, suasion.__version__]
    text = json.dumps(parts, sort_keys=True, default=str)
    return Manifest(stage, hashlib.sha256(text.encode()).hexdigest(), config, hashes, seed)


def content_hash(source: str) -> str:
    """Hash of what an input holds: a file, a folder, or the name itself if it is neither.

    `file.py:function` and `pipeline:FOLDER#LABEL` count with the contents of the file or folder.
    """
    path = Path(source)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        listed = json.dumps(folder_hashes(path, (*SCRATCH, MANIFEST, BEGUN)), sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()
    for part in (source.rpartition(":")[0], source.removeprefix("pipeline:").partition("#")[0]):
        if part not in ("", source) and Path(part).exists():
            return f"{source} of {content_hash(part)}"
    return f"name:{source}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse to work in a stage's folder while another process does; nothing if it is not there.

    The operating system keeps the lock with the folder itself and lifts it when a process ends,
    however it ends. A file system that has no locks is taken to be used by one process.

    Raises:
        ConfigError: another process works in it.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise ConfigError(
            f"{folder} is being written by another process",
            "wait for it or stop it, or choose another --out folder",
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(opened)


def finished(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The stored manifest, if this very stage is finished in `folder` and its files are intact."""
    stored = _ours(folder / MANIFEST)
    if stored is None or stored["fingerprint"] != manifest.fingerprint:
        return None
    for name, expected in stored["outputs"].items():
        output = folder / name
        if not output.is_file() or file_hash(output) != expected:
            return None
    return stored


def claim(folder: Path, manifest: Manifest) -> bool:
    """Make `folder` ready for the stage; True if it was begun before and can be continued.

    Raises:
        ConfigError: the folder holds files that this stage did not write.
        StorageError: the folder cannot be made.
    """
    begun = _ours(folder / BEGUN)
    if begun is not None and begun["fingerprint"] == manifest.fingerprint:
        return True
    held = _held(folder)
    damaged = [name for name in (MANIFEST, BEGUN) if (folder / name).is_file()]
    if held is None and damaged:
        raise ConfigError(
            f"{folder} holds files that suasion did not write, or its {damaged[0]} is damaged",
            "choose an empty --out folder; if a stage wrote it, delete it to run that stage again",
        )
    if held is None and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files that suasion did not write", "choose an empty --out folder"
        )
    if held is not None and held["stage"] != manifest.stage:
        raise ConfigError(
            f"{folder} holds the stage {held['stage']}, and {manifest.stage} would replace it",
            "choose another --out folder",
        )
    _set_aside(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN, {"stage": manifest.stage, "fingerprint": manifest.fingerprint})
    return False


def abandon(folder: Path) -> None:
    """Remove the folder of a stage that stopped before it wrote anything; take back what waits."""
    if all(path.is_dir() or path.name in (BEGUN, ARITHMETIC) for path in folder.rglob("*")):
        shutil.rmtree(folder)
        if _held(_waiting(folder)):
            _waiting(folder).rename(folder)


def take_back(folder: Path, manifest: Manifest) -> None:
    """If what waits beside `folder` is this very stage, and what is in there not, put it back."""
    held, waiting = _held(folder), _held(_waiting(folder))
    if waiting is None or waiting["fingerprint"] != manifest.fingerprint:
        return
    if held is None and folder.exists():
        return
    if held is not None and held["fingerprint"] == manifest.fingerprint:
        return
    shutil.rmtree(folder, ignore_errors=True)
    _waiting(folder).rename(folder)


def _set_aside(folder: Path) -> None:
    """Let a stage wait while it is made anew; one that is finished rather than one that is not."""
    if _held(folder) is None:
        return
    waiting = _waiting(folder)
    if waiting.exists() and _held(waiting) is None:
        raise ConfigError(
            f"{folder} is to wait in {waiting}, which suasion did not write",
            "give that one another name",
        )
    if waiting.exists() and _ours(folder / MANIFEST) is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with storage_errors(waiting):
        shutil.rmtree(waiting, ignore_errors=True)
        folder.rename(waiting)


def _waiting(folder: Path) -> Path:
    return folder.with_name(folder.name + BEFORE)


def _held(folder: Path) -> dict[str, Any] | None:
    """What a stage of ours says of `folder`, begun or finished."""
    return _ours(folder / BEGUN) or _ours(folder / MANIFEST)


def _ours(path: Path) -> dict[str, Any] | None:
    """What a stage of ours wrote to `path`; None if it is not there or of someone else."""
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
    except DataError:
        return None
    is_ours = isinstance(stored, dict) and {"stage", "fingerprint"} <= stored.keys()
    return stored if is_ours else None


def complete(
    folder: Path, manifest: Manifest, result: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Write the manifest, drop scratch files, and return what was written."""
    for name in SCRATCH[:2]:
        shutil.rmtree(folder / name, ignore_errors=True)
    for leftover in folder.rglob(f"*{PARTIAL}"):
        leftover.unlink(missing_ok=True)
    outputs = folder_hashes(folder, (*SCRATCH, MANIFEST, BEGUN))
    counts = result.get("counts")
    stored: dict[str, Any] = {
        "stage": manifest.stage,
        "status": "complete",
        "fingerprint": manifest.fingerprint,
        "seed": manifest.seed,
        "seconds": round(seconds, 3),
        **({"counts": counts} if counts else {}),
        "result": {key: value for key, value in result.items() if key != "counts"},
        "config": dict(manifest.config),
        "inputs": dict(manifest.inputs),
        "outputs": outputs,
        "versions": versions(),
        "commit": commit(),
    }
    write_json(folder / MANIFEST, stored)
    (folder / BEGUN).unlink(missing_ok=True)
    if _held(_waiting(folder)):
        shutil.rmtree(_waiting(folder), ignore_errors=True)
    return stored


def changed_keys(folder: Path, manifest: Manifest) -> list[str]:
    """What differs between a finished stage in `folder` and the one about to run, for people."""
    stored = _ours(folder / MANIFEST)
    if stored is None:
        return []
    before, now = flat(stored.get("config", {})), flat(manifest.config)
    changes = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    inputs = stored.get("inputs", {})
    changes += [
        f"{key}: other content"
        for key in manifest.inputs
        if inputs.get(key) != manifest.inputs[key]
    ]
    if stored.get("seed") != manifest.seed:
        changes.append(f"seed: {stored.get('seed')} -> {manifest.seed}")
    return changes or ["its files were changed, or another version made it"]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Options by their whole names, as JSON."""
    found: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(inner, default=str)
    return found


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    found = {"python": platform.python_version(), "suasion": suasion.__version__}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the source tree suasion runs from, or None when it was installed as a package.

    A package in a virtual environment often lies inside its user's own repository, whose commit
    says nothing about suasion: only a repository that tracks this very file counts.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints in `folder`, or None where it refuses or is not installed."""
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
