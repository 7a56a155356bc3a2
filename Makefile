# What a newcomer needs: `make train` and `make test`. Everything is installed into .venv, in the versions of
# constraints.txt; a step runs again only when a file that it depends on has changed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# The first of these that is new enough; `make PYTHON=/path/to/python train` takes another.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)) python3)
RECIPE ?= configs/recipes/quickstart.yaml
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/done
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -q -c constraints.txt
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
BUILD_OPTIONS := $(MOEMM_BUILD) $(DEBUG) $(TORCH_CUDA_ARCH_LIST) $(CXX)

# DeepSpeed compiles some ops when they are first used: into this environment, not into a folder that others share.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export DS_BUILD_OPS := 0

.PHONY: help setup train test lint results cuda-check soak format clean distclean FORCE

help:  ## this list
	@echo "make TARGET, with TARGET one of"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(DONE)/4-build  ## make .venv and build moemm._C

train: setup  ## set up, then train RECIPE (the quickstart: six tasks, at most 6 minutes on 2 cores)
	@echo "[5/5] training $(RECIPE) ..."
	@$(BIN)/moemm train $(RECIPE) --resume

test: setup  ## set up, then check style and types and run the tests
	@echo "[5/5] checking style and types, then running the tests ($(WORKERS) at a time) ..."
	@$(MAKE) lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

lint: setup  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "some files are not formatted: make format"; exit 1; }
	@$(BIN)/mypy

results: setup  ## all measured figures as one table, misses first
	@$(BIN)/python -m benchmarks.tables

cuda-check:  ## compile the CUDA ops for sm_80 and sm_90, link, import; no GPU needed, some minutes, 6 GB
	@$(PYTHON) tools/cuda_check.py

soak: setup  ## what takes long: sanitizers, every case of the fault table, tests marked soak; about an hour and a half
	@status=0; \
	$(BIN)/python -m benchmarks.soak || status=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults || status=1; \
	MOEMM_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m soak || status=1; \
	exit $$status

format: setup  ## let ruff format the Python files
	@$(BIN)/ruff format .

clean:  ## remove what was built and cached; keeps .venv and runs
	rm -rf build dist *.egg-info moemm/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DONE)/4-build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV) .venv-cuda

$(DONE)/1-venv:
	@echo "[1/5] making $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "moemm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." \
			"Name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@mkdir -p $(DONE)
	@touch $@

$(DONE)/2-torch: constraints.txt | $(DONE)/1-venv
	@echo "[2/5] installing $$(grep ^torch== constraints.txt) and the build tools ..."
	@$(PIP) torch setuptools wheel ninja pybind11 numpy
	@touch $@

$(DONE)/3-packages: $(DONE)/2-torch pyproject.toml
	@echo "[3/5] installing DeepSpeed and the other packages ..."
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		extra = p["optional-dependencies"]; print(*p["dependencies"], *extra["dev"], sep="\n")' \
		> $(VENV)/requirements.txt
	@$(PIP) --no-build-isolation -r $(VENV)/requirements.txt
	@touch $@

$(DONE)/4-build: $(DONE)/3-packages $(SOURCES) $(VENV)/build-options
	@echo "[4/5] building moemm._C ($(or $(MOEMM_BUILD),auto)) ..."
	@$(PIP) --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from moemm.ops import backend_info as info; i = info(); b = i["build"] or {}; \
		print("      ops:", i["live"] + ",", "CPU and CUDA" if i["cuda"] else "no CUDA ops: " + i["why_no_cuda"])'
	@touch $@

# Changes only when the options do, so that `make MOEMM_BUILD=... setup` builds again.
$(VENV)/build-options: FORCE | $(DONE)/1-venv
	@echo "$(BUILD_OPTIONS)" | cmp -s - $@ || echo "$(BUILD_OPTIONS)" > $@
