# Needs Python 3.11 or newer with pip and venv, and nothing else: everything is installed into .venv beside this file.
# All paths are relative to this folder, so that its own path may hold spaces.

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all matrix lint clean

setup: $(STAMP)

# torch comes first and alone: which build of it fits (CPU, CUDA) is settled before anything else is resolved.
$(STAMP): requirements.lock setup.py pyproject.toml
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Installing into $(VENV) with $$("$$python" --version)."; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    echo "venv failed: install the venv module of this Python (Debian: apt install python3-venv)."; exit 1; \
	  fi; \
	done; echo "No Python 3.11 or newer was found. Install one, or type: make PYTHON=/path/to/python3"; exit 1
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements.lock)" --constraint requirements.lock
	$(PY) -m pip install --quiet --requirement requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup
	$(PY) -m distllm pipeline pipeline=demo run.dir=runs/demo

# Two test files at a time, each on one core.
test: setup
	$(PY) -m pytest --numprocesses=2 --dist=loadfile

# Everything, part by part, each a folder of tests/ with a row of its own in docs/test_all.md; or one: make test-all PART=engines
PART := $(sort $(patsubst tests/%/,%,$(dir $(wildcard tests/*/test_*.py)))) .

test-all: setup
	@failed=; for part in $(PART); do \
	  $(PY) -m pytest --record-part="$$part" || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "Parts with failures:$$failed"; exit 1; }

matrix: setup
	DISTLLM_MATRIX_DIR=runs/matrix $(PY) -m pytest -m "slow or not slow" tests/engines/test_matrix.py
	PYTHONPATH=. $(PY) tests/engines/matrix_table.py runs/matrix > docs/engine_matrix.md

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

clean:
	rm -rf $(VENV) build dist *.egg-info
