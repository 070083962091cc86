# `make demo` runs the main job; `make test` passes the tests. Both set up everything they need.
# Without an NVIDIA GPU the CPU build of torch is taken (constraints-cpu.txt); with one, the CUDA build.
PYTHON ?= python3
VENV ?= .venv
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter-out 0,$(GPU)),,-c constraints-cpu.txt)
BIN := $(VENV)/bin

.PHONY: demo test lint types gate check clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(CONSTRAINTS) -e '.[models,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/gigamorph demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

gate: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_gate.py --faults

check: lint types test gate

clean:
	rm -rf $(VENV) build *.egg-info
