# Targets of README.md. The environment is .venv, from pyproject.toml alone; every target can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Transparent huge pages halve the time of a training step on CPU (BUILD_NOTES.md); read at process start only.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo test test-all bench lint clean

setup: $(VENV)/.setup

$(VENV)/.base: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing rlhf_jax into $(VENV) …"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.setup: $(VENV)/.base
	@$(PIP) install --editable '.[dev]'
	@touch $@

demo: $(VENV)/.base
	@$(BIN)/python experiments/demo/pipeline.py --workdir runs/demo

lint: $(VENV)/.setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.base
	@$(BIN)/python experiments/benchmarks/bench.py

clean:
	rm -rf $(VENV) .cache runs
