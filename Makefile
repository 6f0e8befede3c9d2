# The targets set everything up themselves: they need Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where there is no NVIDIA GPU, torch's CPU build (a tenth of the size) is offered beside PyPI's.
TORCH_INDEX := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--retries 2 --extra-index-url https://download.pytorch.org/whl/cpu")

# Files one by one, in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-cluster lint bench chaos install clean

demo: install  ## compress the example model by four methods on a local Ray cluster and compare them
	$(BIN)/python -m pipeline run examples/compare.yaml --address local

test: test-fast test-cluster  ## everything: what .ci/run calls

test-fast: install lint  ## lint, types, and the tests that need no cluster of several nodes
	$(BIN)/python -m pytest -m "not slow" $(BY_FILE) --numprocesses auto --maxprocesses 4 --durations 15

test-cluster: install  ## real clusters of several nodes, killed workers, nodes and drivers, submitted jobs
	$(BIN)/python -m pytest -m slow $(BY_FILE) --numprocesses 3 --durations 15

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## measure against a script by hand, the compute limit and the disk; writes docs/benchmarks.md (10 GB of disk)
	$(BIN)/python -m bench.run

SEED ?= 0
RUNS ?= 10

chaos: install  ## RUNS runs whose workers, nodes and drivers are killed at random moments, under a minute each, and one without Ray
	$(BIN)/python -m tests.cluster.campaign --seed $(SEED) --runs $(RUNS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hcsmoe needs Python 3.11 or newer; set PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval,s3]'
	touch $@

clean:
	rm -rf $(VENV) runs
