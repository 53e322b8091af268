# make demo   sets up everything and converts a sample recording
# make test   sets up everything and runs what CI runs
# Both work on a fresh machine with Python 3.10 or newer, and are quick when repeated.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Test workers; each computes with one thread, so that they do not fight over the cores.
JOBS   ?= auto

.PHONY: demo test lint picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/autovoice demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

picture: $(VENV)/.installed-dev
	$(BIN)/python scripts/make_picture.py

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev,eval]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version) is too old; auto_voice needs Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: the venv could not be made; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

clean:
	rm -rf $(VENV) build dist demo_out .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache
