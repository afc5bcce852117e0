"""Sphinx settings of the site.

The project's folder is the source, so that links between pages, tutorials and results are the same here and in a
checkout: ``sphinx-build -c docs . docs/_build/html``.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "captum-fusion"
author = "The captum-fusion developers"
release = version = version_of("captum-fusion")

extensions = [
    "cyclopts.ext.sphinx",
    "equations",
    "myst_nb",
    "names",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "tutorials/**",
    "benchmarks/results/**",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "docs/_*", "**/.ipynb_checkpoints"]

# Docstrings tell the types, in Captum's words; signatures tell the order and the defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    # What bases bring is shown, but not what Captum's and Python's do, nor the steps that a new method overrides.
    "inherited-members": "Attribution,LayerAttribution,GradientAttribution,PerturbationAttribution,BaseException,tuple",
    "exclude-members": "attribute_future,channel_maps,channel_weights,compute_convergence_delta,multiplies_by_inputs,"
    "sampled_masks",
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Our own names lead somewhere; docstrings tell types in words, of which not all are names.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!captum_fusion).*")]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
# Tutorials are shown as they were executed last.
# The tables behind the results are reached from the page of the results.
suppress_warnings = ["myst.header", "toc.not_included"]
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"

# The second inventory of each is for building without a network: it holds the names that the pages use. Captum has none
# of its own.
intersphinx_mapping = {
    "captum": ("https://captum.ai/api/", "docs/inventories/captum.inv"),
    "numpy": ("https://numpy.org/doc/stable/", (None, "docs/inventories/numpy.inv")),
    "torch": ("https://docs.pytorch.org/docs/stable/", (None, "docs/inventories/torch.inv")),
    "torchvision": ("https://docs.pytorch.org/vision/stable/", (None, "docs/inventories/torchvision.inv")),
}
intersphinx_timeout = 5

html_theme = "furo"
html_title = f"captum-fusion {release}"
html_show_copyright = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Leads from the top of the site to its start page.
html_extra_path = ["_top"]


def setup(app: Sphinx) -> None:
    """Leaves out the empty line after an example, by which doctest tells its end."""

    def trim(_: Sphinx, doctree: nodes.document) -> None:
        for block in doctree.findall(nodes.literal_block):
            block.rawsource = block.astext().rstrip()
            block[:] = [nodes.Text(block.rawsource)]

    app.connect("doctree-read", trim)
