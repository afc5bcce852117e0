"""Sphinx settings of the API reference."""

from importlib.metadata import version as version_of

project = "captum-fusion"
author = "The captum-fusion developers"
release = version = version_of("captum-fusion")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "cyclopts.ext.sphinx"]
exclude_patterns = ["_build"]

# Docstrings tell the types, in Captum's words; signatures tell the order and the defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"captum-fusion {release}"
html_show_copyright = False
