# Everything a newcomer runs. The set-up lives in .venv/, is done by whichever target needs it first, and again only
# when one of the files that it depends on has changed.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
SETUP_FILES := pyproject.toml setup.py constraints.txt
STAMP := $(VENV)/.set-up-$(shell cat $(SETUP_FILES) | cksum | cut -d' ' -f1)
SUPPORTED := import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$python; break; }; done)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo ablations test lint format clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed to the demo and to pytest, PYTHON=... names another interpreter for the set-up'

setup: $(STAMP)  ## make .venv/ with the pinned packages; the other targets do this themselves

$(STAMP):
	@if [ ! -x $(BIN)/python ]; then \
		$(if $(PYTHON),$(PYTHON),false) -c '$(SUPPORTED)' || { \
			echo 'make: needs Python 3.11 with its venv module, found as python3.11 or python3 (Debian: apt install' \
				'python3.11-venv); make PYTHON=/path/to/python3.11 names one' >&2; exit 1; }; \
		$(PYTHON) -m venv $(VENV); fi
	@echo 'setting up $(VENV) with the pinned packages; the first time this takes minutes'
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.set-up-*
	@touch $@

demo: $(STAMP)  ## the whole road on one small machine: videos to a pretrained tiny model, an MP4 and a report
	$(BIN)/python tools/demo.py $(ARGS)

ablations: $(STAMP)  ## the paper's ablations, tiny, on the demo's clips: figure 10 from runs of 15 minutes
	$(BIN)/python examples/ablations/run.py $(ARGS)

# Lint first: it takes seconds, and its complaints are read best in the tools' own words.
test: lint  ## lint, then the default tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)  ## ruff, mypy and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## rewrite the files in ruff's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove .venv/, caches and build outputs; runs and demo_run stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
