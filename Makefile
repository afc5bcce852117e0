# `make demo` and `make test` need Python, make and a package index, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

LOWEST = .venv-lowest

.PHONY: demo test test-lowest lint docs tutorials benchmark clean

# One environment, to which each target adds the extra that it needs: $(VENV)/demo has the extra `demo`. uv installs it
# in a fraction of pip's time; installed again only when the project file changes.
$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv

$(VENV)/%: pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --quiet --python $(VENV) --editable ".[$*]"
	touch $@

demo: $(VENV)/demo
	$(BIN)/captum-fusion explain --target espresso --target "Egyptian cat" --methods grad-cam score-cam fusion-cam \
	  --output demo/fusion_cam.png --force

test: $(VENV)/test
	$(BIN)/pytest -n 2 --dist worksteal

# torch 2.4 needs Python 3.12 or older, torchcam 3.11 or later. pip tries versions against these bounds for hours.
$(LOWEST)/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --editable ".[test]" --constraint tests/lowest.txt
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py

# Executed from a clean kernel each; the outputs of this run stay out of the checkout.
tutorials: $(VENV)/tutorials
	for notebook in tutorials/*.ipynb; do \
	  $(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/tutorials $$notebook || exit 1; \
	done

# Hours, with three repeats of everything; see the options of the script.
benchmark: $(VENV)/benchmark
	$(BIN)/python benchmarks/score_cam.py
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) $(LOWEST)
