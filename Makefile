# make demo   sets up everything and converts a sample recording
# make check  lint, types and the fast tests: under three minutes on two idle cores
# make test   sets up everything and runs what CI runs: lint, types, all tests with coverage, among
#             them the gate on the sound, then the fast tests on other Pythons
# All work on a fresh machine with Python 3.10 or newer, and are quick when repeated.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP_OPTIONS = install --quiet --disable-pip-version-check -c constraints.txt
PIP     = $(BIN)/python -m pip $(PIP_OPTIONS)
# Test workers; each computes with one thread, so that they do not fight over the cores.
JOBS   ?= auto
THREADS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PYTEST  = -m pytest -n $(JOBS) --durations=20
FAST    = -m "not weights and not slow"
# Fast tests wait for processes and servers: one worker more than there are cores.
CHECK_JOBS ?= $$(($$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 1))
# Pythons besides $(PYTHON) that the fast tests run on, without torch.
PYTHONS ?= 3.10 3.13

.PHONY: demo check test lint pythons $(PYTHONS:%=python-%) picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/autovoice demo

check: lint
	$(THREADS) $(BIN)/python $(PYTEST) -n $(CHECK_JOBS) $(FAST)

test: lint
	$(THREADS) $(BIN)/python $(PYTEST) --cov --cov-report=term
	@$(MAKE) --no-print-directory pythons

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pythons: $(PYTHONS:%=python-%)

# An interpreter that is not here, or whose packages cannot be had, costs its lane and not the run.
$(PYTHONS:%=python-%): python-%:
	@found=; for one in $$(command -v python$*) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$*.*/bin/python; \
	  do if "$$one" -c '' 2>/dev/null; then found=$$one; break; fi; done; \
	if [ -z "$$found" ]; then echo "make: Python $* is not installed here; its tests are left out"; exit 0; fi; \
	if ! { "$$found" -m venv $(VENV)-$* && $(VENV)-$*/bin/python -m pip $(PIP_OPTIONS) -e '.[test-light]'; }; \
	  then echo "make: the packages for Python $* could not be installed; its tests are left out"; exit 0; fi; \
	echo "Python $*, without torch:"; \
	$(THREADS) $(VENV)-$*/bin/python $(PYTEST) $(FAST) -q

picture: $(VENV)/.installed-dev
	$(BIN)/python scripts/make_picture.py

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version) is too old; auto_voice needs Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: the venv could not be made; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

clean:
	rm -rf $(VENV) $(PYTHONS:%=$(VENV)-%) build dist demo_out .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache
