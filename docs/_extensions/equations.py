r"""Shows the equations of docstrings, which are plain text there, as mathematics.

In a docstring, the lines that are indented under a ``::`` are equations, unless they are examples (``>>>``)::

    w_k = sum(g_k A_k) / sum(A_k)
    L = sum_k w_k A_k
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from plain_text import as_latex
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

# What a sentence says of an equation's terms: A_k, w_D, A_k'.
_INDEXED = re.compile(r"\b[A-Za-z]_[A-Za-z0-9]\b'?")

_log = logging.getLogger(__name__)


def _show_equations(_: Sphinx, doctree: nodes.document) -> None:
    """Turns what docstrings say in plain text into mathematics."""
    for docstring in list(doctree.findall(addnodes.desc_content)):
        for block in list(docstring.findall(nodes.literal_block)):
            if "language" not in block and ">>>" not in block.astext():
                try:
                    latex = as_latex(block.astext())
                except ValueError as error:
                    _log.warning("Not an equation: %s", error, location=block)
                    continue
                block.replace_self(nodes.math_block(latex, latex, number=None, **{"no-wrap": True}))
        for text in list(docstring.findall(nodes.Text)):
            if type(text.parent) in (nodes.paragraph, nodes.inline) and _INDEXED.search(text):
                text.parent.replace(text, list(_with_mathematics(text)))


def _with_mathematics(text: str) -> Iterator[nodes.Node]:
    for part in re.split(rf"({_INDEXED.pattern})", text):
        yield nodes.math(part, as_latex(part)) if _INDEXED.fullmatch(part) else nodes.Text(part)


def _show(block: bool) -> Callable[[HTML5Translator, nodes.Element], None]:
    def visit(translator: HTML5Translator, node: nodes.Element) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    return visit


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers MathML, which browsers show without a script, and the equations of docstrings."""
    app.add_html_math_renderer("mathml", inline_renderers=(_show(False), None), block_renderers=(_show(True), None))
    app.connect("doctree-read", _show_equations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
