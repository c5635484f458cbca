# From a fresh clone with nothing installed: `make demo` or `make test`. Python 3.11 or later is all that is needed.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: help demo test test-slow lint format bench build clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       set up, then distil a small teacher into a smaller student, end to end on the CPU'
	@echo 'make test       set up, then run the tests (PYTEST_ARGS="-k name" to choose)'
	@echo 'make test-slow  the slow tests'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     let ruff mend and format'
	@echo 'make bench      the benchmarks beside TRL and Liger'
	@echo 'make build      the wheel, in dist/'
	@echo 'make clean      remove what these made, the environment included'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, for example: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# A stamp newer than pyproject.toml and constraints.txt means that the environment is up to date. -qq leaves errors only.
$(VENV)/.user-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV) (a few minutes the first time) ...'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,plots]'
	@touch $@

$(VENV)/.dev-stamp: $(VENV)/.user-stamp
	@echo 'Installing the developer tools into $(VENV) ...'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,plots]'
	@touch $@

demo: $(VENV)/.user-stamp
	$(BIN)/trl-opd demo

test: $(VENV)/.user-stamp
	$(BIN)/python -m pytest -m 'not slow and not gpu' $(PYTEST_ARGS)

# pytest leaves with 5 when PYTEST_ARGS chooses no slow test.
test-slow: $(VENV)/.user-stamp
	$(BIN)/python -m pytest -m 'slow and not gpu' $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev-stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.user-stamp
	$(BIN)/trl-opd bench head
	$(BIN)/trl-opd bench step

build: $(VENV)/.user-stamp
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
