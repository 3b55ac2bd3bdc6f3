# The targets a newcomer needs; each prepares the virtual environment by itself, once.
#
#   make demo    the whole story on the embedded world: offline, CPU, minutes
#   make test    the test suite
#   make lint    format, style, types and the import rules between rooms
#
# Variables: VENV=.venv  PYTHON=python3  TORCH=auto|cpu|cuda  DEMO_ARGS="--output runs/demo --updates 20"

VENV ?= .venv
PYTHON ?= python3
TORCH ?= auto
DEMO_ARGS ?=
PYTEST_ARGS ?=

# Written last, so that an interrupted installation starts over and a finished one costs nothing.
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint format clean

help:
	@sed -n '3,8s/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash scripts/install.sh "$(VENV)"
	@touch $@

demo: $(STAMP)
	@$(VENV)/bin/vggrpo demo $(DEMO_ARGS)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
