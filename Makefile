# Every target does all its set-up in .venv; a machine needs Python >= 3.10 and make, no more.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
RECIPE ?= demo
TORCH  ?=
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.NOTPARALLEL:
.PHONY: demo test test-slow test-processors test-torch style lint format docs bench clean

demo: $(VENV)/.demo          ## train, certify and attack a network on Fashion-MNIST, or on digits without it
	$(BIN)/orthonet train $(RECIPE)

test: style                  ## style, the tests, and the documentation with warnings as errors
	$(PYTEST)

test-slow: $(VENV)/.test     ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

test-processors: $(VENV)/.test  ## the tests under the kernels of other processors
	$(BIN)/python -m tests.processors -n $(JOBS) --dist worksteal

test-torch:                  ## the tests with another PyTorch, in a separate .venv: make test-torch TORCH=2.6.0
	$(MAKE) VENV=$(VENV)-torch-$(TORCH) $(VENV)-torch-$(TORCH)/.test
	$(VENV)-torch-$(TORCH)/bin/python -m pytest -n $(JOBS) --dist worksteal

style: $(VENV)/.test         ## what ruff finds, in less than a second
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style $(VENV)/.lint    ## style and types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test        ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test          ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.bench        ## everything against its peers, and the pages that show it
	$(BIN)/python -m benchmarks.orthogonalizers --lr 1e-4 --threads 2
	$(BIN)/python -m benchmarks.floor --threads 2
	$(BIN)/python -m benchmarks.linear_step --threads 2
	$(BIN)/python -m benchmarks.convolutions --threads 2
	$(BIN)/python -m benchmarks.manifolds --threads 2
	$(BIN)/python -m benchmarks.rnn --threads 2
	$(BIN)/python -m benchmarks.certificates
	$(BIN)/python -m benchmarks.certificate_peers
	$(BIN)/python -m benchmarks.optim --steps 1000
	$(BIN)/python -m benchmarks.across_processes
	$(BIN)/python -m benchmarks.presets
	$(BIN)/python -m benchmarks.launches
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.page

clean:                       ## everything that the targets above made
	rm -rf $(VENV) site runs

# One stamp a kind of set-up: it is redone only when pyproject.toml changes.
$(VENV)/.pip:
	@echo "Setting up $(VENV), once: PyTorch is large, this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=25.1"
	touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.pip pyproject.toml
	$(PIP) -e . --group test $(if $(TORCH),torch==$(TORCH))
	touch $@

$(VENV)/.lint: $(VENV)/.pip pyproject.toml
	$(PIP) -e . --group dev
	touch $@

$(VENV)/.bench: $(VENV)/.pip pyproject.toml
	$(PIP) -e . --group test --group bench
	touch $@
