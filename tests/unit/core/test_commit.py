"""Whose commit a manifest names: suasion's own, or none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import suasion

PACKAGE = Path(suasion.__file__).parent


def git(folder: Path, *arguments: str) -> str:
    """What git prints, as an author that needs no settings."""
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout.strip()


def reported(packages: Path) -> str:
    """The commit that a suasion below `packages` reports, in a process of its own."""
    code = "from suasion.core import manifest; print(manifest.__file__, manifest.commit())"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=packages,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    file, commit = done.stdout.split()
    assert Path(file).is_relative_to(packages)
    return commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_users_own_repository_is_not_ours(tmp_path: Path) -> None:
    """Installed in an environment inside it: no commit. Tracked by it: its commit."""
    git(tmp_path, "init", "--quiet")
    packages = tmp_path / ".venv" / "lib"
    (packages / "suasion").mkdir(parents=True)
    shutil.copy(PACKAGE / "__init__.py", packages / "suasion")
    shutil.copytree(PACKAGE / "core", packages / "suasion" / "core")
    (tmp_path / "paper.txt").write_text("The user's own.\n")
    git(tmp_path, "add", "paper.txt")
    git(tmp_path, "commit", "--quiet", "--message", "A paper")
    assert reported(packages) == "None"

    git(tmp_path, "add", "--force", str(packages / "suasion" / "core"))
    git(tmp_path, "commit", "--quiet", "--message", "A copy of the source")
    assert reported(packages) == git(tmp_path, "rev-parse", "HEAD")
