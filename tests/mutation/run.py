"""Test the tests: change the mathematics a little, and see whether a test notices.

`python tests/mutation/run.py [module ...]` mutates suasion.functional (or the named modules of it),
runs the functional tests on each mutant in a forked process, and prints the survivors. Exit status
1 when one survives that `equivalent.json` does not list with its reason, or when that file lists a
mutant that does not exist or does not survive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shape checks cost a second a mutant, and a mutant that only they notice is a missing test.
os.environ["JAXTYPING_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import hypothesis
import pytest
import torch
from mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "suasion"
TESTS = ROOT / "tests" / "unit" / "functional"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
# The tabular runs to convergence take seconds each and notice little that the formulas' tests miss.
# The shapes test wants the checks that are off here.
LEFT_OUT = {TESTS / "test_optimum.py", TESTS / "test_shapes.py"}
SECONDS_PER_MUTANT = 60


def main(names: list[str]) -> int:
    """Run every mutant of the named modules, or of all."""
    started, known = time.monotonic(), json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    modules = [p for p in sorted((PACKAGE / "functional").glob("*.py")) if p.stem != "__init__"]
    modules = [p for p in modules if not names or p.stem in names]
    hypothesis.settings.register_profile(
        "mutation", max_examples=15, derandomize=True, database=None, deadline=None
    )
    hypothesis.settings.load_profile("mutation")
    warm_up()
    survivors, total = set(), 0
    for module in modules:
        if not killed(module, Mutant("unchanged", "raise SystemExit(1)")):
            raise SystemExit(
                f"the tests pass without {module.stem}: they are not run against the mutants"
            )
        if killed(module, Mutant("unchanged", module.read_text(encoding="utf-8"))):
            raise SystemExit(f"the tests of {module.stem} fail before anything is changed")
        for mutant in mutants_of(module.read_text(encoding="utf-8")):
            total += 1
            if not killed(module, mutant):
                key = f"{module.stem}.{mutant.key}"
                survivors.add(key)
                print("listed:  " if key in known else "survived:", key, flush=True)
    expected = {key for key in known if key.split(".")[0] in {p.stem for p in modules}}
    for key in sorted(expected - survivors):
        print(f"listed as equivalent, but killed or gone: {key}")
    seconds = time.monotonic() - started
    print(f"{total} mutants, {len(survivors)} survived, {len(expected)} listed, {seconds:.0f} s")
    return int(survivors != expected)


def killed(module: Path, mutant: Mutant) -> bool:
    """Whether a test fails on the mutant; its own tests are asked first."""
    own = TESTS / f"test_{module.stem}.py"
    rest = [p for p in sorted(TESTS.glob("test_*.py")) if p not in {own, *LEFT_OUT}]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run_tests(module, mutant, own, rest)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) != 0


def run_tests(module: Path, mutant: Mutant, own: Path, rest: list[Path]) -> int:
    """In the child: shadow the package with one that holds the mutant, run pytest quietly."""
    signal.alarm(SECONDS_PER_MUTANT)
    sys.dont_write_bytecode = True
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with tempfile.TemporaryDirectory() as folder:
        shadow = Path(folder) / "suasion"
        (shadow / "functional").mkdir(parents=True)
        (shadow / "core").symlink_to(PACKAGE / "core")
        (shadow / "__init__.py").write_text("")
        for source in (PACKAGE / "functional").glob("*.py"):
            (shadow / "functional" / source.name).symlink_to(source)
        target = shadow / "functional" / module.name
        target.unlink()
        target.write_text(mutant.source, encoding="utf-8")
        sys.path.insert(0, folder)
        return (own.exists() and run_pytest([own])) or run_pytest(rest)


def run_pytest(files: list[Path]) -> int:
    """Run some files and stop at the first failure."""
    # The parent has imported hypothesis, which pytest would have liked to do.
    early = "ignore::pytest.PytestAssertRewriteWarning"
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-W", early]
    return int(pytest.main([*options, *map(str, files)]))


def warm_up() -> None:
    """Import, once for all forks, whatever the tests import and torch loads late."""
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    run_pytest(sorted(set(TESTS.glob("test_*.py")) - LEFT_OUT))
    ours = (str(ROOT / "src"), str(TESTS))
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(ours):
            del sys.modules[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main(sys.argv[1:]))
