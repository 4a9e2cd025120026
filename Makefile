# `make quickstart` runs the main job, `make test` the tests. Both create .venv and install what they need; they require only
# Python, make and a C compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all docs format clean
.NOTPARALLEL:

quickstart: $(VENV)/.installed
	$(BIN)/upcycle quickstart $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --durations=10 $(ARGS)

# Includes the tests that repeat an invariant at another size or layout, those against PyTorch, and Weights & Biases; prints what is skipped.
test-all: override ARGS += -m "" -rs
test-all: $(VENV)/.installed-hf test

# Writes the page of macros, then all pages into site/.
docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/macros.py
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("upcycle needs Python 3.11 to 3.13, but %s is %d.%d: choose another with `make PYTHON=python3.12 ...`" % (("$(PYTHON)",) + v))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-hf: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[hf,wandb]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
