# `make` lists what there is to do. Every target runs in the environment VENV, which `make env` creates.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow bench check lint types format clean

PYTHON ?= python3
VENV ?= .venv
TEST_ARGS ?=
# Processes that share the tests.
TEST_JOBS ?= 2

# This checkout comes before another one that VENV may have installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

space := $(subst x, ,x)
RUN := "$(VENV)/bin/python"
# Written when an installation is complete: it is repeated when it was interrupted, or when what it installs has changed.
STAMP := $(subst $(space),\ ,$(VENV))/.d2_objssl-installed
INSTALLED := requirements.txt requirements-detectron2.txt requirements-dev.txt setup.py tools/install_detectron2.py

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=python3.12 chooses the Python of a new environment, VENV=folder another environment (now $(VENV))."

env: $(STAMP) ## Create the environment .venv, or bring it up to date (5 GB, a few minutes)

$(STAMP): $(INSTALLED)
	@rm -f "$@"
	@if [ -n "$${VIRTUAL_ENV:-}" ] && ! [ "$$VIRTUAL_ENV" -ef "$(VENV)" ]; then \
	    echo "The active environment $$VIRTUAL_ENV is left alone; to install there: make env VENV=\"\$$VIRTUAL_ENV\""; fi
	@if ! [ -x $(RUN) ]; then \
	    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "error: $(PYTHON) is missing or older than Python 3.10; name another: make env PYTHON=python3.12" >&2; exit 1; }; \
	    echo "Creating the environment $(VENV) with $$("$(PYTHON)" --version)"; \
	    "$(PYTHON)" -m venv "$(VENV)"; fi
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(RUN) -m ensurepip
	@echo "Installing requirements.txt and requirements-dev.txt"
	@$(RUN) -m pip install -r requirements.txt -r requirements-dev.txt
	@$(RUN) tools/install_detectron2.py
	@echo "Installing d2_objssl, editable"
	@$(RUN) -m pip install --no-deps --no-build-isolation -e .
	@touch "$@"

demo: env ## Pretrain, fine-tune and draw on made-up scenes; writes output/demo
	$(RUN) tools/demo.py

test: env ## Run the fast tests; more options in TEST_ARGS="..."
	$(RUN) -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

test-slow: env ## Run all tests, the slow ones too
	$(RUN) -m pytest -n $(TEST_JOBS) --dist worksteal --runslow $(TEST_ARGS)

bench: env ## Speed of every stage against the plain way, in short (5 minutes)
	$(RUN) benchmarks/speed.py all --quick

check: lint types ## What CI checks beside the tests: ruff check, ruff format --check, mypy

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: env
	$(RUN) -m mypy d2_objssl

format: env ## Format the code and sort its imports
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Delete caches and build leftovers; environment and output stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
