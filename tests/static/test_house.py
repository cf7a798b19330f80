"""The house rules that no linter knows."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import suasion
from suasion.config import schema

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "suasion"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(info.name for info in pkgutil.walk_packages(suasion.__path__, "suasion."))
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "scipy"}
"""What no one should wait for who only asks for help."""
OTHER_NAMES = {
    "html_to_markdown": "html-to-markdown",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
}
"""Packages that are imported under another name than they are installed."""


@cache
def parsed(path: Path) -> ast.Module:
    """A source file as a tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def project() -> Any:
    """The `[project]` table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    """On its own, and what it lists as public is there and in order."""
    module = importlib.import_module(name)
    public = getattr(module, "__all__", None)
    if public is not None:
        assert sorted(public) == list(public)
        assert not [entry for entry in public if not hasattr(module, entry)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_a_package_lists_what_it_offers(path: Path) -> None:
    """A package that gathers names from its modules says which ones are public."""
    gathered = {
        alias.asname or alias.name
        for node in parsed(path).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("suasion")
        for alias in node.names
    }
    listed = getattr(importlib.import_module(module_name(path)), "__all__", ())
    assert gathered <= set(listed)


def module_name(path: Path) -> str:
    """Dotted name of a package's `__init__.py`."""
    return ".".join(path.parent.relative_to(ROOT / "src").parts)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import suasion; status = 0", 0),
        ("from suasion.cli.main import main; status = main(['--help'])", 0),
        ("from suasion.cli.main import main; status = main(['--version'])", 0),
        ("from suasion.cli.main import main; status = main(['rnu'])", 2),
        ("from suasion.cli.main import main; status = main(['run', 'no-such-recipe.yaml'])", 2),
        ("from suasion.cli.main import main; status = main(['ppo', '--setps', '3'])", 2),
        ("from suasion.cli.main import main; status = main(['demo', '--ppo.stesp', '3'])", 2),
    ],
    ids=["import", "help", "version", "no command", "no recipe", "option", "override"],
)
def test_quick_answers_load_nothing_heavy(code: str, status: int) -> None:
    """Help and mistakes answer at once: nothing big is imported for them."""
    check = f"import sys; print('loaded', status, sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"loaded {status} []"


def config_classes() -> list[type[Any]]:
    """Every configuration class."""
    found = [value for value in vars(schema).values() if isinstance(value, type)]
    return [kind for kind in found if is_dataclass(kind) and issubclass(kind, schema.Strict)]


def test_every_option_is_read() -> None:
    """A field of a configuration that nothing reads is a promise that nothing keeps."""
    read = {
        node.attr
        for path in SOURCES
        if path != PACKAGE / "config" / "schema.py"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = {
        f"{kind.__name__}.{entry.name}"
        for kind in config_classes()
        for entry in fields(kind)
        if entry.name not in read
    }
    assert not unread


def test_every_option_says_what_it_is() -> None:
    """Below each field of a configuration stands its docstring; help texts come from there."""
    for node in parsed(PACKAGE / "config" / "schema.py").body:
        if not isinstance(node, ast.ClassDef):
            continue
        for entry, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(entry, ast.AnnAssign) and "ClassVar" not in ast.unparse(entry.annotation):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert said, f"{node.name}.{ast.unparse(entry.target)}"


def test_every_import_is_declared() -> None:
    """What the package imports, pyproject.toml names; so an installation is complete."""
    extras = project()["optional-dependencies"]
    groups = [project()["dependencies"], *(extras[name] for name in extras if name != "dev")]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower() for group in groups for line in group}
    used = {name for path in SOURCES for name in imported(path)}
    used -= {"suasion", *sys.stdlib_module_names}
    assert not {OTHER_NAMES.get(name, name) for name in used} - declared


def test_every_dependency_is_used() -> None:
    """And nothing is installed for nothing: of what demo and stages need, all is imported."""
    used = {OTHER_NAMES.get(name, name) for path in SOURCES for name in imported(path)}
    # torch's writer for tensorboard imports it by itself.
    needed = {re.split(r"[\[<>=!~; ]", line)[0] for line in project()["dependencies"]}
    assert needed - {"tensorboard"} <= used


def test_every_dependency_is_pinned() -> None:
    """`make` installs from constraints.txt; each line is one exact version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    pinned = {pin.partition("==")[0] for pin in pins}
    table = project()
    wanted = [*table["dependencies"], *table["optional-dependencies"]["dev"]]
    assert {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in wanted} <= pinned


def test_layers() -> None:
    """Imports point back only; every folder has its layer."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(  # noqa: S603
        [str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_peer_is_never_imported() -> None:
    """Neither by the package nor by a test."""
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in files if "trl" in imported(path)]
