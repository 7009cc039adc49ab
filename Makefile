# Every target sets up .venv first if it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test lint bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with tptrain and the tested versions of what it needs

run: $(READY)  ## Train the default model on this machine: offline, real text, a minute or two
	$(BIN)/tptrain

test: lint  ## Run the linters, the type checker and all tests
	$(BIN)/python -m pytest

lint: $(READY)  ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Measure speed; results print as ratios
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.tensor_parallel
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.pipeline_overhead
	$(BIN)/python -m benchmarks.plan_time
	$(BIN)/python -m benchmarks.tokenising
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.async_saves

clean:  ## Remove .venv, caches and tokenised data; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist outputs/token_stores
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tptrain needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
