# Every target makes .venv when it is missing and installs what it needs from the pinned versions; a second call installs
# nothing. The stamps are older than pyproject.toml or constraints.txt after a change there, which installs again.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt

# Idle threads sleep instead of spinning: on a shared machine a spinning one takes the core that the other thread needs.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test slow lint format types
.NOTPARALLEL:

demo: $(VENV)/.stamp-demo
	HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/quickstart.py

PYTEST_ARGS ?= -n auto

test: $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Thousands of mutated files, hundreds of kills, every family: an hour on a small machine.
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

# The linter alone: checking the style shouldn't need PyTorch.
$(VENV)/.stamp-lint: $(VENV)/.stamp-python $(PINS)
	$(PIP) ruff
	touch $@

# torch first and by its exact version: a range would let pip choose another build, with gigabytes of CUDA libraries.
# setuptools with it: the build backend is then a pinned one too, and no isolated build environment has to be made.
$(VENV)/.stamp-torch: $(VENV)/.stamp-python $(PINS)
	$(PIP) setuptools "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch
	$(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@
