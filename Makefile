# `make` lists what there is. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev train test test-full lint format types bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.run ## install what training needs
setup-dev: $(VENV)/.dev ## install what development needs, too

$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; try make PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV), once ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the tools of development into $(VENV), once ..."
	@$(PIP) -e '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0 # its interpreter; torch for CUDA has one
	@touch $@

train: setup ## train a small GPT on this machine, within minutes
	@$(BIN)/python -m sophia_train experiment=demo

test: setup-dev ## the tests, within 10 minutes on 2 cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu and not multi_gpu"

test-full: setup-dev ## the tests, the slow ones included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu and not multi_gpu"

lint: setup-dev ## style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup-dev ## mend style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: setup-dev ## static types
	@$(BIN)/mypy

bench: setup-dev ## our trainer next to transformers' GPT-2 in a plain loop
	@$(BIN)/python scripts/benchmark.py train

clean: ## remove what was installed and cached; runs and data stay
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
