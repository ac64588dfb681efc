# Every target works from a clean checkout with Python >= 3.11, make and a package index.
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/demo
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-fast test-device test-tpu-compile lint bench fuzz clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv and install the package with its test and lint tools

# The stamp is newer than pyproject.toml only after an installation that finished.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	@touch $@

demo: .venv/installed ## train two specialists and a weight agent, compare it with every baseline (SEED=0 OUT=runs/demo)
	$(BIN)/rlae-jax demo --seed $(SEED) --out $(OUT)

test: .venv/installed ## the tests, but for the few that guard against rare mistakes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not rare and not tpu'

# The TPU compiler is large, and JAX looks for it where it is installed: it gets an environment of its own.
.venv-tpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --upgrade pip
	.venv-tpu/bin/python -m pip install --quiet --editable '.[test,tpu]'
	@touch $@

test-tpu-compile: .venv-tpu/installed ## compile every program for TPUs that are not there, and look at what comes out
	JAX_PLATFORMS=cpu XLA_FLAGS= .venv-tpu/bin/python -m pytest -n 2 --dist worksteal -m tpu tests/tpu

test-all: test ## all tests: those, and then the few
	$(BIN)/python -m pytest -n 2 --dist worksteal -m rare

test-fast: .venv/installed ## the tests that matter most
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not rare and not tpu'

# In one process: a device is one. On a CPU it is just these tests, compiled as for use.
test-device: .venv/installed ## the tests that mean something on a GPU or TPU, on what JAX finds (no -n: one process)
	RLAE_JAX_TEST_PLATFORM=device $(BIN)/python -m pytest -m 'device and not rare'

lint: .venv/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers need torch; the CPU build is several gigabytes smaller where the index offers it (BENCH_TORCH=torch==2.13.0).
BENCH_TORCH ?= torch
.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet '$(BENCH_TORCH)'
	@touch $@

bench: .venv/bench ## all benchmarks but benchmarks/tpu.py, tables and JSON in runs/bench
	mkdir -p runs/bench
	for file in $$(grep -l __main__ benchmarks/*.py | grep -v tpu); do \
	  name=$$(basename $$file .py); \
	  $(BIN)/python -m benchmarks.$$name --json runs/bench/$$name.json || exit 1; \
	done

# atheris has wheels for some versions of Python and of Linux alone.
FUZZ_SECONDS ?= 600
.venv/fuzz: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	@touch $@

fuzz: .venv/fuzz ## documents that are wrong somewhere for every reader, guided by coverage (FUZZ_SECONDS=600)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.faults.fuzz_guided -- -max_total_time=$(FUZZ_SECONDS) -max_len=512

clean: ## remove .venv, runs and caches
	rm -rf .venv .venv-tpu runs .pytest_cache .mypy_cache .ruff_cache
