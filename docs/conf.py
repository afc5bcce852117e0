"""Sphinx configuration: ``sphinx-build -c docs . docs/_build/html``.

The source is the project's root, so that links between pages, tutorials and results work on the site and in a checkout.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "captum-fusion"
author = "The captum-fusion developers"
release = version = version_of("captum-fusion")

extensions = [
    "cyclopts.ext.sphinx",
    "myst_nb",
    "names",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
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

# Docstrings state types in Captum's words; signatures show the order and the defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    # Members of our own bases, but not of Captum's or Python's, nor the steps that a new method overrides.
    "inherited-members": "Attribution,LayerAttribution,GradientAttribution,PerturbationAttribution,BaseException,tuple",
    "exclude-members": "attribute_future,channel_maps,channel_weights,compute_convergence_delta,multiplies_by_inputs,"
    "sampled_masks,second_order_gradients",
}
# One page for each class and function, listed with the first line of its docstring.
autosummary_generate = True
autosummary_ignore_module_all = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Every own name has to resolve. Types in docstrings are words, and not all of them are names.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!captum_fusion).*")]

myst_enable_extensions = ["attrs_block", "deflist", "dollarmath"]
myst_heading_anchors = 4
# The page of the results links its tables, which are in no table of contents.
suppress_warnings = ["myst.header", "toc.not_included"]
# The site shows the outputs that the notebooks were saved with.
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"

# The second inventory of each serves builds without a network. Captum publishes none.
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
templates_path = [str(Path(__file__).parent / "_templates")]
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Redirects from the top of the site to its start page.
html_extra_path = ["_top"]


def setup(app: Sphinx) -> None:
    """Renders mathematics as MathML, which needs no script, and removes the empty line that ends an example."""

    def show(translator: HTML5Translator, node: nodes.Element) -> None:
        latex, block = node.astext(), isinstance(node, nodes.math_block)
        if r"\\" in latex:
            latex = rf"\begin{{aligned}} {latex} \end{{aligned}}"
        translator.body.append(tex2mathml(latex, as_block=block))
        raise nodes.SkipNode

    def trim(_: Sphinx, doctree: nodes.document) -> None:
        for block in doctree.findall(nodes.literal_block):
            block.rawsource = block.astext().rstrip()
            block[:] = [nodes.Text(block.rawsource)]

    app.add_html_math_renderer("mathml", inline_renderers=(show, None), block_renderers=(show, None))
    app.connect("doctree-read", trim)
