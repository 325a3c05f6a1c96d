# One command for each thing a developer does; each sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
OUT ?= build/gpu

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Freed memory stays with the process, so that no step pays for page faults that the one before did not.
ALLOCATOR := MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_MMAP_THRESHOLD_=100000000000

# The tests run many small tensors, for which two threads cost more than they give.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-nets check docs bench gpu wheel clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

demo: $(VENV)/.installed  ## train a network plain and optimized, side by side
	$(PY) -m normpass demo

test: $(VENV)/.installed  ## run the tests, without the long sweeps over networks
	$(ONE_THREAD) $(PY) -m pytest -m "not nets" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-nets: $(VENV)/.installed  ## run the long sweeps over networks and record the results
	$(ONE_THREAD) $(PY) -m pytest -m nets tests --results tests/bench/results

check: $(VENV)/.checkers  ## ruff, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(call link_tree,build/typing)
	MYPYPATH=build/typing $(VENV)/bin/mypy --package normpass
	$(PY) -m pytest --quiet tests/project/test_layers.py

docs: $(VENV)/.documents  ## the pages of docs/, in build/docs; a warning is an error
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

bench: $(VENV)/.installed  ## time, kept and peak bytes of four networks against eager; ARGS="--batch 8", ARGS=kernels
	$(ALLOCATOR) $(PY) -m normpass bench $(ARGS)

# For a machine that has torch, pytest and the package's other needs, and no network: nothing is installed.
gpu:  ## on a machine with a GPU, with its own Python, in ten minutes: correctness, benchmarks, tests; OUT=folder
	@$(PYTHON) -c 'import importlib.util, sys; importlib.util.find_spec("torch") or sys.exit("make gpu: this Python has no torch")'
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no GPU here")'
	$(PYTHON) tests/gpu/run_all.py $(OUT)

# libgomp stays out: the libraries run on the one that torch brings and has loaded, or there would be two.
wheel: $(VENV)/.installed  ## a wheel for any Python on this platform, in dist/: it installs without a compiler
	rm -rf build/wheel && mkdir -p build/wheel
	$(PY) -m pip --quiet --disable-pip-version-check wheel --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

clean:  ## remove what the other commands made, the environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis normpass-demo.png

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/include/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the other packages into $(VENV), once: some gigabytes, a minute or more"
	$(PIP) --editable ".[test,demo]"
	@touch $@

$(VENV)/.checkers: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.documents: $(VENV)/.installed
	$(PIP) --editable ".[docs]"
	@touch $@

# A throw-away package of links, as an installed one looks: `normpass` with `passes` and `kernels` in it.
define link_tree
@rm -rf $(1) && mkdir -p $(1)/normpass && ln -s $(CURDIR)/normpass/* $(CURDIR)/passes $(CURDIR)/kernels $(1)/normpass
endef
