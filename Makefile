# Every target creates .venv if it is missing, and installs what it needs in pinned versions. A second call installs nothing.
# If pyproject.toml or constraints.txt changes, the stamps are outdated, and the next call installs again.

PYTHON ?= python3
VENV ?= .venv
# Without `--no-compile`, pip compiles every file of every package, also the many that nobody imports.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# pip says nothing while it works. A line every few seconds says that the installation goes on, until its shell ends.
SAY_ALIVE := while sleep 8 >/dev/null && kill -0 $$$$ 2>/dev/null; do echo "still installing ..."; done &
PINS := pyproject.toml constraints.txt

# Idle threads sleep instead of spinning. On a shared machine, a spinning thread takes a core that another thread needs.
export OMP_WAIT_POLICY ?= PASSIVE

# The tests start many processes. Without bytecode on disk, each of them would compile PyTorch and Transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test slow floors lint format types docs
.NOTPARALLEL:

demo: $(VENV)/.stamp-demo
	HF_HUB_OFFLINE=1 $(VENV)/bin/python examples/quickstart.py

# A worker that has nothing left takes half of what another one has left. So few files are split, and their fixtures made twice.
PYTEST_ARGS ?= -n auto --dist worksteal

# No test depends on the wall clock: other work on the machine makes the tests slower, and nothing else. One that takes
# longer than any process is given (`PATIENCE` in tests/processes.py) hangs: it fails, and shows where it was.
HANG_SECONDS = 2400
HANGS = -o faulthandler_timeout=$(HANG_SECONDS) -o faulthandler_exit_on_timeout=true
test: $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest --durations 20 $(HANGS) $(PYTEST_ARGS)

# Thousands of mutated files, hundreds of kills, every family. This takes an hour on a small machine.
# A single one may take long on a busy machine.
slow: HANG_SECONDS = 7200
slow: $(VENV)/.stamp-dev
	$(VENV)/bin/python -m pytest -m slow $(HANGS) $(PYTEST_ARGS)

# The same tests with the lowest versions of `dependencies` in pyproject.toml (except torch), in an environment of their
# own. The packages of the extras are as new as fits beside them. Not in CI.
floors: $(VENV)-floors/.stamp
	$(VENV)-floors/bin/python -m pytest $(HANGS) $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.stamp-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.stamp-dev
	$(VENV)/bin/mypy

# The site, in site/. Broken links, broken anchors and pages without a place in the navigation are errors.
docs: $(VENV)/.stamp-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "Open site/index.html. The search needs a server: $(VENV)/bin/python -m http.server -d site"

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
	@echo "Installing PyTorch ..."
	@$(SAY_ALIVE) $(PIP) setuptools "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch
	@echo "Installing this package and what the demo needs ..."
	@$(SAY_ALIVE) $(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch
	@echo "Installing this package and what its tests need ..."
	@$(SAY_ALIVE) $(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

# torch is the one of constraints.txt: the lowest one has no build for CPUs on PyPI. pyarrow 26 (of datasets) runs only
# with NumPy 2, and does not tell pip so.
$(VENV)-floors/.stamp: $(PINS)
	$(PYTHON) -m venv $(VENV)-floors
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z]*\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml | grep -v '^torch=' > $(VENV)-floors/versions.txt
	grep '^torch==' constraints.txt >> $(VENV)-floors/versions.txt
	echo 'pyarrow<26' >> $(VENV)-floors/versions.txt
	@$(SAY_ALIVE) $(VENV)-floors/bin/python -m pip install --quiet --no-compile --constraint $(VENV)-floors/versions.txt --editable '.[dev]'
	touch $@
