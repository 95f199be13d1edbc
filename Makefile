# Every target creates .venv if it is missing, and installs what it needs in pinned versions. A second call installs nothing.
# If pyproject.toml or constraints.txt changes, the stamps are outdated, and the next call installs again.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt

# Idle threads sleep instead of spinning. On a shared machine, a spinning thread takes a core that another thread needs.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test slow lint format types
.NOTPARALLEL:

demo: $(VENV)/.stamp-demo
	HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/quickstart.py

PYTEST_ARGS ?= -n auto

test: $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Thousands of mutated files, hundreds of kills, every family. This takes an hour on a small machine.
slow: $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.stamp-dev
	$(VENV)/bin/mypy

$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Only the linter: checking the style does not need PyTorch.
$(VENV)/.stamp-lint: $(VENV)/.stamp-python $(PINS)
	$(PIP) ruff
	touch $@

# torch is installed first, with its exact version. With a range, pip could choose another build with gigabytes of CUDA libraries.
# setuptools is installed here too, so that the build backend is pinned and no isolated build environment is needed.
$(VENV)/.stamp-torch: $(VENV)/.stamp-python $(PINS)
	$(PIP) setuptools "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch
	$(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
