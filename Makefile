# `make demo` runs the main job; `make test` passes the tests; `make docs` builds the site into build/site. All set up
# everything they need.
# Without an NVIDIA GPU the CPU build of torch is taken (constraints-cpu.txt), from its vendor's index where that can be
# reached: on the public index the same version is the CUDA build, of several gigabytes. With a GPU, the CUDA build.
PYTHON ?= python3
VENV ?= .venv
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter-out 0,$(GPU)),,-c constraints-cpu.txt)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin

.PHONY: demo test quick test-newest lint types docs gate check clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
ifneq ($(CONSTRAINTS),)
	@if $(PYTHON) -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=10)" 2>/dev/null \
		&& $(BIN)/pip install --quiet $(CONSTRAINTS) --index-url $(CPU_INDEX) torch torchvision; \
	then echo "torch and torchvision: CPU builds of $(CPU_INDEX)"; \
	else echo "torch and torchvision: of pip's own index, for $(CPU_INDEX) does not offer them here"; fi
endif
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet $(CONSTRAINTS) -e '.[models,dev]'
	@$(BIN)/python -c "import torch; print('torch', torch.__version__, torch.version.cuda and 'CUDA build' or 'CPU build')"
	touch $@

demo: $(VENV)/installed
	$(BIN)/gigamorph demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

quick: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" -q

# The tests of the core on the newest PyTorch that pip offers, in an environment of its own (several gigabytes).
test-newest: $(VENV)/installed
	$(BIN)/python tests/releases.py --json build/releases.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/gates.py

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed
	PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gate: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_gate.py --faults --rows build/compile_gate.jsonl

check: lint types test

clean:
	rm -rf $(VENV) build *.egg-info
