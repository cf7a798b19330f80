# What one does with this project, each with one word. `make demo` and `make test` need nothing but
# Python 3.11 (or later) and make: what they need else, they install once, into .venv.

PYTHON := $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python -m
INSTALL := $(RUN) pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
TESTS ?= tests/static tests/unit tests/integration tests/e2e

PEERS := classic last new

.PHONY: help demo test check mutants evidence bench-peers bench clean

help:
	@echo "make demo     the whole pipeline on a small world with a known truth, into runs/demo"
	@echo "make test     every test that a small machine can run"
	@echo "make check    format, lint, types, layers"
	@echo "make mutants  change the formulas one by one and see whether a test notices"
	@echo "make evidence train small policies on known problems, curves into docs/evidence"
	@echo "make bench-peers  environments of the libraries we are compared with, into .peers"
	@echo "make bench    speed and memory beside theirs, 45 minutes, tables into docs/benchmarks.md"
	@echo "make clean    remove .venv, .peers and caches; runs stay"

demo: .venv/runtime.stamp
	.venv/bin/suasion demo

# One thread: what tests compute is too small to share, and several processes run at once.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) pytest -q $(TESTS)

check: .venv/dev.stamp
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	.venv/bin/lint-imports

mutants: .venv/dev.stamp
	OMP_NUM_THREADS=1 .venv/bin/python tests/mutation/run.py

evidence: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(RUN) benchmarks.evidence

bench-peers: $(PEERS:%=.peers/%/installed.stamp)

# BENCH=--resume goes on with a run that was cut short.
bench: .venv/dev.stamp
	$(RUN) benchmarks.speed $(BENCH)

clean:
	rm -rf .venv .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch first and alone, in exactly the version asked for: whatever build of it pip is set up to
# find stays, and nothing later replaces it. The build tool comes from the same list of versions.
.venv/runtime.stamp: pyproject.toml constraints.txt
	@echo "installing into .venv, once"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(INSTALL) $(TORCH) hatchling editables
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

# Each in an environment of its own, which shares nothing with ours.
.peers/%/installed.stamp: benchmarks/speed/peers/%.txt benchmarks/speed/peers/torch.txt
	@echo "installing into .peers/$*, once"
	@test -x .peers/$*/bin/python || $(PYTHON) -m venv .peers/$*
	@.peers/$*/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
		--requirement benchmarks/speed/peers/torch.txt
	@.peers/$*/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
		--constraint benchmarks/speed/peers/torch.txt --requirement $<
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
