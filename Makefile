# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests examples benchmarks compat docs
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow compat faults soak check format docs bench bench-scaling clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Make .venv and install the project in it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,slow]'
	@touch $@

demo: setup ## Train a real 135M chat model on preferences and compare it before and after (about 4 minutes)
	$(BIN)/firesteel models pull smollm2-135m-instruct
	$(BIN)/python examples/demo.py

test: setup ## Run the fast tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-slow ## Run the tests with the real model and foreign packages (TRL, tinker)
	$(BIN)/python -m pytest -m slow --timeout 1800

compat: setup ## Run tinker and two Fireworks SDKs against a server of this machine (minutes; the first time longer)
	$(BIN)/python compat/run.py

faults: $(VENV)/.installed-slow ## Kill, stop and starve runs, TRIES times each (20), and print what survived (half an hour)
	FIRESTEEL_FAULT_TRIES=$(or $(TRIES),20) $(BIN)/python -m pytest -m slow tests/faults --timeout 7200 -s

soak: $(VENV)/.installed-slow ## Sixteen users on one server for five minutes
	FIRESTEEL_SOAK_SECONDS=300 $(BIN)/python -m pytest -m slow tests/slow/test_soak.py --timeout 900 -s

check: setup ## Format, lint, types, layers
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: setup ## Format the code and mend what lint can mend
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

docs: setup ## Build the documentation site into build/site, from the pages and the schemas; a broken link fails
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

bench: $(VENV)/.installed-slow ## Compare with TRL on this machine (an hour or more; ONLY=c-lora-cold runs one cell)
	$(BIN)/firesteel models pull smollm2-135m-instruct
	$(BIN)/python benchmarks/compare.py --json benchmarks/results.json $(foreach cell,$(ONLY),--only $(cell))

bench-scaling: setup ## Cost by sequence length, batch and rows; memory by token budget (about 15 minutes)
	$(BIN)/firesteel models pull smollm2-135m-instruct
	$(BIN)/python benchmarks/scaling.py --json benchmarks/scaling.json

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build/site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
