# Everything a newcomer runs. The set-up lives in .venv/, is done by whichever target needs it first, and again only
# when one of the files that it depends on has changed.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
SETUP_FILES := pyproject.toml setup.py constraints.txt
STAMP := $(VENV)/.set-up-$(shell cat $(SETUP_FILES) | cksum | cut -d' ' -f1)
KERNEL_FILES := kernels/toolchain.py $(sort $(wildcard kernels/csrc/*.cpp kernels/csrc/*/*))
COMPILED := $(VENV)/.compiled-$(shell cat $(KERNEL_FILES) | cksum | cut -d' ' -f1)
SUPPORTED := import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$python; break; }; done)
ARGS ?=
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); [ $$cores -lt 4 ] && echo $$cores || echo 4)

.DEFAULT_GOAL := help
.PHONY: help setup demo ablations test fuzz kernels lint format clean faults

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed to the program behind a target (make demo ARGS=--help); WORKERS=0 tests in a single process'
	@echo '  PYTHON=... names another interpreter for the set-up'

setup: $(COMPILED)  ## make .venv/ with the pinned packages; the other targets do this themselves

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

# With nvcc the CUDA kernels, with a C++ compiler alone the CPU part, without either nothing: the references answer.
$(COMPILED): $(STAMP)
	@echo 'compiling the ops of kernels/ with what this machine has'
	$(BIN)/python setup.py -q build_ext --inplace
	@rm -f $(VENV)/.compiled-*
	@touch $@

demo: $(COMPILED)  ## the whole road on one small machine: videos to a pretrained tiny model, an MP4 and a report
	$(BIN)/python tools/demo.py $(ARGS)

ablations: $(COMPILED)  ## the paper's ablations, tiny, on the demo's clips: figure 10 from 21 short runs
	$(BIN)/python examples/ablations/run.py $(ARGS)

# Lint first: it takes seconds, and its complaints are read best in the tools' own words. A file of tests stays in one
# worker, since its ranks are started once for all of its tests; files go out in order, those that take long first.
test: lint $(COMPILED)  ## lint, then the default tests, one file a core
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# In full what `make test` does in part: three architectures, 2,000 shapes, and 200 of them under AddressSanitizer, which
# is many times slower; nothing is skipped. ARGS="--minutes 3" begins no further piece after so long; the next call goes on.
kernels: $(STAMP)  ## build the CUDA kernels and prove them without a GPU; where nvcc is missing, install its wheels
	@$(BIN)/python kernels/toolchain.py nvcc || { $(BIN)/python -m pip install -qq -r kernels/nvcc.txt && \
		chmod +x $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/* $(VENV)/lib/python3*/site-packages/nvidia/cu13/nvvm/bin/*; }
	MEGACOGVX_KERNELS=cuda $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python kernels/prove.py $(ARGS)

faults: $(STAMP)  ## every fault of the matrix, planted and recovered; a quarter of an hour, goes on where it was stopped
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python tests/faults/matrix.py $(ARGS)

fuzz: $(STAMP)  ## 2,000 seeded mutations of every parser of datasets, 200 kills and 200 full disks of a writer
	$(BIN)/python tools/fuzz.py $(ARGS)

lint: $(STAMP)  ## ruff, mypy and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## rewrite the files in ruff's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove .venv/, caches and build outputs; runs and demo_run stay
	rm -rf $(VENV) build dist *.egg-info kernels/megacogvx_kernels/_compiled.* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
