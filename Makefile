# `make demo` and `make test` need Python, make and a package index, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

LOWEST = .venv-lowest

.PHONY: demo test test-lowest lint benchmark clean

# One environment for everything: installed again only when the project file changes.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/captum-fusion explain --output demo/fusion_cam.png

test: $(VENV)/installed
	$(BIN)/pytest

# torch 2.3 needs Python 3.10 to 3.12.
$(LOWEST)/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --editable ".[test]" --constraint tests/lowest.txt
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours, with three repeats of everything; see the options of the script.
benchmark: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[benchmark]"
	$(BIN)/python benchmarks/score_cam.py

clean:
	rm -rf $(VENV) $(LOWEST)
