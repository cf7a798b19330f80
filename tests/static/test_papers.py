"""What the papers around the code say is true: README, changelog, documents, recipes, the wheel."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from suasion.cli.commands import COMMANDS, KINDS
from suasion.cli.options import parse_stage
from suasion.cli.run import plain
from suasion.config.load import parse_overrides, validate
from suasion.config.recipe import load_recipe
from suasion.config.schema import DemoConfig, GenerateConfig, PrepareConfig
from suasion.core import errors
from suasion.core.summary import Summary

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "suasion"
LEFT_OUT = {"runs", "dist", "build", "__pycache__"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".css", ".html", ".cfg", ""}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.md")])
DEMO = PACKAGE / "cli" / "demo.yaml"
RECIPES = [*sorted(ROOT.glob("recipes/**/*.yaml")), DEMO]
# Folders of one machine, and hosts that packages are fetched from: pip knows where to look.
MACHINE = re.compile(r"(?<![\w.])/(?:work|home|root|Users|opt)/\w")
REGISTRY = re.compile(r"(?:pypi|pythonhosted|anaconda|test\.pypi)\.(?:org|com)|download\.pytorch")


def project_files() -> Iterator[Path]:
    """Every text file of the project, and none that a tool left."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and path.suffix in TEXT and not hidden and not LEFT_OUT & set(parts):
            yield path


def test_nothing_names_a_machine_or_a_registry() -> None:
    """A file that works here only, or that decides where packages come from, is a fault."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in project_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE.search(line) or REGISTRY.search(line)
    ]
    assert not found


def test_changelog_knows_the_version() -> None:
    """Its newest numbered heading is the version that would be released."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert newest
    assert newest[1] == version["version"]


def test_readme_tree_is_the_tree() -> None:
    """One line for each folder of the package, and none for one that is not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^ *src/suasion/\n((?: +\w+/ .*\n)+)", text, re.MULTILINE)
    assert tree
    listed = re.findall(r"^ +(\w+)/ ", tree[1], re.MULTILINE)
    there = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert sorted(listed) == sorted(there)


def documented_commands() -> Iterator[tuple[str, str]]:
    """Each command in a shell block of a document, with the document's name."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(
            r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("suasion ", ".venv/bin/suasion ", "make ")):
                    yield str(document.relative_to(ROOT)), line.partition(" #")[0].strip()


@pytest.mark.parametrize(("document", "line"), sorted(set(documented_commands())))
def test_documented_commands_exist(document: str, line: str) -> None:
    """Every command shown would be accepted: its name, its options, its values."""
    program, name, *arguments = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), document
    elif "--help" in arguments:
        assert name in COMMANDS, document
    elif name in KINDS:
        parse_stage(KINDS[name], name, arguments)
    elif name == "prepare":
        parse_stage(PrepareConfig, name, ["--dump", *arguments[1:]])
    elif name == "generate":
        validate(GenerateConfig, parse_overrides(arguments), line)
    elif name == "demo":
        given = parse_overrides(arguments)
        own: dict[str, object] = {
            key: given[key] for key in ("out", "seed", "questions") if key in given
        }
        validate(DemoConfig, own, line)
        rest = [word for pair in _pairs(arguments) for word in pair if pair[0] != "--questions"]
        load_recipe(DEMO, ["--prepare.dump", "somewhere", *rest])
    elif name == "run":
        recipe = ROOT / arguments[0]
        # One that the reader is to write has the keys of any other.
        known = recipe if recipe.is_file() else DEMO
        load_recipe(known, ["--prepare.dump", "somewhere", *arguments[1:]])
    else:
        assert name in COMMANDS or name.startswith("--"), document


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    return zip(arguments[::2], arguments[1::2], strict=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_resolve(path: Path) -> None:
    """Every recipe is complete when called as its first lines say: inputs named or made."""
    call = re.search(r"^# +suasion run \S+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    given = shlex.split(call[1]) if call else ["--prepare.dump", "somewhere"]
    load_recipe(path, given)


def test_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    """What a run writes down as its recipe is a recipe, with nothing left open."""
    recipe = load_recipe(DEMO, ["--prepare.dump", "somewhere"])
    written = tmp_path / "recipe.yaml"
    written.write_text(yaml.safe_dump(plain(asdict(recipe))), encoding="utf-8")
    assert load_recipe(written) == recipe


def documented_recipes() -> Iterator[tuple[str, str]]:
    """Each recipe printed in a document."""
    for document in DOCUMENTS:
        for block in re.findall(r"(?ms)^```yaml\n(.*?)^```", document.read_text("utf-8")):
            yield str(document.relative_to(ROOT)), block


@pytest.mark.parametrize(("document", "block"), sorted(documented_recipes()))
def test_documented_recipes_resolve(document: str, block: str, tmp_path: Path) -> None:
    """And so is every recipe that a document prints."""
    path = tmp_path / Path(document).name
    path.write_text(block, encoding="utf-8")
    load_recipe(path)


def test_summary_is_documented() -> None:
    """docs/summary.md has one row for each key of summary.json, in their order."""
    text = (ROOT / "docs" / "summary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [entry.name for entry in fields(Summary)]


def test_stages_are_documented() -> None:
    """docs/stages.md has a section for every stage, and the exit code of every error."""
    text = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) >= {"prepare", *KINDS}
    codes = dict(re.findall(r"^\| (\d+) \| `(\w+)`", text, re.MULTILINE))
    kinds = errors.SuasionError.__subclasses__()
    assert codes == {str(kind.exit_code): kind.__name__ for kind in kinds}


def test_links_lead_somewhere() -> None:
    """Each relative link of a document names a file that is there."""
    missing = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8"))
        if not (document.parent / target).exists()
    ]
    assert not missing


def test_wheel_is_whole(tmp_path: Path) -> None:
    """It holds every file of the package, those without code too, and the licence."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert ours <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
