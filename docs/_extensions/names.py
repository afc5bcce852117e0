"""Links names in ``double backticks`` to this reference, Captum, torch, torchvision and NumPy."""

import re
from typing import Any

import captum.attr
import captum.metrics
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import captum_fusion
from captum_fusion import functional, metrics, regions, targets

_PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (captum.attr, captum.metrics, functional, targets, metrics, regions, captum_fusion)
    for name in getattr(module, "__all__", dir(module))
    if getattr(getattr(module, name), "__module__", "").partition(".")[0] in ("captum", "captum_fusion")
}
_KNOWN = re.compile(r"(captum|captum_fusion|numpy|torch|torchvision)(\.[A-Za-z]\w*)+")


def _link_names(_: Sphinx, doctree: nodes.document) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().removesuffix("()")
        name = _PUBLIC.get(name, name)
        inside = (nodes.reference, nodes.title, addnodes.pending_xref)
        if _KNOWN.fullmatch(name) and not isinstance(literal.parent, inside):
            ours = name.startswith("captum_fusion.")
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name, refwarn=ours)
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the links."""
    app.connect("doctree-read", _link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
