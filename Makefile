# Everything a developer runs. `make help` lists it.

PYTHON      ?= python3
VENV        ?= .venv
WHEEL_VENV  ?= .venv-wheel
JOBS        ?= 2
PYTEST_ARGS ?=
WHEEL_TESTS ?= tests/test_packaging.py $(wildcard tests/test_public_api.py) tests/test_end_to_end.py

BIN       := $(VENV)/bin
WHEEL_BIN := $(abspath $(WHEEL_VENV))/bin
STAMP     := $(VENV)/.installed
BENCH     := $(VENV)/.installed-bench
TORCH     := $(shell grep '^torch==' constraints.txt)
# examples and benchmarks hold scripts: name the files, so that an empty folder is no error
TYPED     := $(wildcard fxprune tests examples/*.py benchmarks/*.py)

# test workers share the cores: one thread each
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format type pyright bench wheel-test clean

help: ## Show this text
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables (make NAME=value ...):"
	@echo "  PYTHON       interpreter that creates the environments, 3.11 or newer  [$(PYTHON)]"
	@echo "  VENV         development environment                                   [$(VENV)]"
	@echo "  WHEEL_VENV   environment that the wheel is tested in                   [$(WHEEL_VENV)]"
	@echo "  JOBS         test workers                                              [$(JOBS)]"
	@echo "  PYTEST_ARGS  more arguments for pytest, e.g. '-k gru -x'               [$(PYTEST_ARGS)]"
	@echo "  WHEEL_TESTS  test files that run against the wheel"
	@echo
	@echo "pip's own variables work too, e.g. PIP_EXTRA_INDEX_URL for a source of CPU-only torch."

setup: $(STAMP) ## Create the environment and install fxprune in it, editable

# torch comes first and by its exact version, or the resolver may fetch CUDA libraries
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxprune needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,demo,search,train]"
	@touch $@

$(BENCH): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	@touch $@

demo: $(STAMP) ## Train, compile and measure a small GRU classifier; leaves demo.onnx
	$(BIN)/fxprune demo

test: $(STAMP) ## Run the tests, all but the slow ones
	$(BIN)/pytest -n $(JOBS) -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Apply the formatting and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## Check types (mypy, strict)
	$(BIN)/mypy $(TYPED)

pyright: $(STAMP) ## Check types once more, with pyright (fetches node where there is none)
	$(BIN)/pyright

bench: $(BENCH) ## Run the slow tests, then every benchmark script
	$(BIN)/pytest -m slow $(PYTEST_ARGS)
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python -m "benchmarks.$$(basename "$$script" .py)"; \
	done

# The tests run from a copy that has no sources beside it, so only the wheel can be imported.
wheel-test: $(STAMP) ## Build the wheel and test that, not the sources
	rm -rf build dist *.egg-info
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	test -x $(WHEEL_BIN)/pip || $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/pip install --quiet -c constraints.txt $(TORCH)
	$(WHEEL_BIN)/pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(WHEEL_BIN)/pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[dev,demo]"
	@set -e; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	cp -R tests pyproject.toml "$$copy"; cd "$$copy"; \
	$(WHEEL_BIN)/python -P -c 'import fxprune; print("testing", fxprune.__file__); assert "site-packages" in fxprune.__file__'; \
	$(WHEEL_BIN)/pytest -n $(JOBS) -m "not slow" -p no:cacheprovider $(WHEEL_TESTS)

clean: ## Remove the environments, builds and caches
	rm -rf $(VENV) $(WHEEL_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
