# `make demo` and `make test` need Python, make and a package index, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

LOWEST = .venv-lowest

.PHONY: demo page test fuzz test-lowest test-wheels lint dist docs tutorials benchmark evidence test-evidence clean

# One environment, to which each target adds what it needs: the extras in EXTRAS_TARGET, and the dependency group of its
# name. uv installs it in a fraction of pip's time; installed again only when the project file changes.
EXTRAS_benchmark = demo
EXTRAS_demo = demo
EXTRAS_dev = hugging-face,page,timm
EXTRAS_docs = cli
EXTRAS_page = page
EXTRAS_test = hugging-face,page,timm
EXTRAS_tutorials = demo,hugging-face,timm
USER_EXTRAS = demo page

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv

$(VENV)/%: pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --quiet --python $(VENV) --editable ".[$(EXTRAS_$*)]" $(if $(filter $*,$(USER_EXTRAS)),,--group $*)
	touch $@

demo: $(VENV)/demo
	$(BIN)/captum-fusion explain --target espresso --target "Egyptian cat" --methods grad-cam score-cam fusion-cam --tolerance 0.05 \
	  --output demo/fusion_cam.png --force

page: $(VENV)/page
	$(BIN)/captum-fusion page

# pytest reads further options, such as --cov or -k score_cam, from PYTEST_ADDOPTS; so does `make fuzz`.
test: $(VENV)/test
	$(BIN)/pytest -n 2 --dist worksteal

# Explores at random; a failure prints how to reproduce it.
fuzz: $(VENV)/test
	$(BIN)/pytest -n 2 --hypothesis-profile=fuzz tests/test_fuzz.py

# torch 2.4 needs Python 3.12 or older, torchcam 3.11 or later. pip tries versions against these bounds for hours.
$(LOWEST)/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --editable ".[$(EXTRAS_test)]" --group test \
	  --constraint tests/lowest.txt
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) dist

# The wheel and the source distribution, as a package index takes them.
dist: $(VENV)/lint
	rm -rf dist
	$(BIN)/python -m build --installer uv --outdir dist > /dev/null
	$(BIN)/twine check --strict dist/*

# The wheel where nothing else is, on each Python that uv finds here: the demo, and one map in the caller's code.
PYTHONS ?= 3.10 3.11 3.12 3.13 3.14
test-wheels: dist
	for python in $(PYTHONS); do \
	  rm -rf build/wheel && $(BIN)/uv venv --quiet --python $$python build/wheel || exit 1; \
	  $(BIN)/uv pip install --quiet --python build/wheel "$$(ls dist/*.whl)[demo]" || exit 1; \
	  (cd build/wheel && bin/captum-fusion explain --methods fusion-cam --tolerance 0.2 --output map.png && \
	    bin/python -c "import torch, captum_fusion as c; m = torch.nn.Conv2d(3, 4, 3); \
	      print(c.LayerXGradCam(lambda x: m(x).mean((2, 3)), m).attribute(torch.rand(1, 3, 8, 8), target=0).shape)") || exit 1; \
	done

docs: $(VENV)/docs
	rm -rf docs/_build
	$(BIN)/sphinx-build -q -W --keep-going -c docs . docs/_build/html
	$(BIN)/lychee --quiet --offline --include-fragments docs/_build/html '*.md' 'benchmarks/**/*.md' 'tutorials/*.md'

# Executed from a clean kernel each; the outputs of this run stay out of the checkout. LEAVES=FOLDER runs Leaf_Diseases on
# photographs of leaves instead of its synthetic ones.
tutorials: $(VENV)/tutorials
	for notebook in tutorials/*.ipynb; do \
	  LEAVES="$(abspath $(LEAVES))" $(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/tutorials \
	    $$notebook || exit 1; \
	done

# Hours, with three repeats of everything; see the options of the script.
benchmark: $(VENV)/benchmark
	$(BIN)/python benchmarks/score_cam.py
	$(BIN)/python -m benchmarks.overhead

# Without FOLDERS, only what anybody can make again in ten minutes: generated images whose deciding pixels are known.
# FOLDERS="--ilsvrc FOLDER ..." measures the paper's claims on photographs, for hours; OPTIONS=--dry-run estimates them.
evidence: $(VENV)/benchmark
	$(BIN)/python -m benchmarks.evidence build/evidence $(FOLDERS) $(OPTIONS)

# Not part of `make test`: what the evidence computes.
test-evidence: $(VENV)/test $(VENV)/benchmark
	$(BIN)/pytest benchmarks/tests

clean:
	rm -rf $(VENV) $(LOWEST)
