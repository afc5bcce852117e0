"""Checks every link of the built pages and of the Markdown files, without a network.

A relative link names a file of the project, an anchor names a place on its page, and any other link is an https URL.

    python docs/check_links.py
"""

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin

ROOT = Path(__file__).parents[1]
PAGES = ["docs/_build/html/**/*.html", "*.md", "docs/*.md", "tutorials/*.md", "benchmarks/results/*.md"]
MARKDOWN = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        text = path.read_text(encoding="utf-8")
        self.feed(MARKDOWN.render(text) if path.suffix == ".md" else text)

    def handle_starttag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what the tag links to and what it names."""
        self.links += [value for name, value in attrs if name in ("href", "src") and value is not None]
        self.anchors |= {value for name, value in attrs if name == "id" and value is not None}


page = cache(Page)


def is_broken(link: str, source: Path) -> bool:
    """Whether a link on the page at source leads nowhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s<>\"]*)?", link)
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if not target.exists() or not target.is_relative_to(ROOT):
        return True
    return target.suffix in {".html", ".md"} and unquote(parts.fragment) not in page(target).anchors


if __name__ == "__main__":
    sources = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    links = [(source, link) for source in sources for link in page(source).links]
    broken = [f"{source.relative_to(ROOT)}: {link}" for source, link in links if is_broken(link, source)]
    if broken:
        sys.exit("\n".join(["These links lead nowhere:", *broken]))
    sys.stdout.write(f"{len(links)} links on {len(sources)} pages, all of them whole\n")
