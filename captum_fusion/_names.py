"""Names that were mistyped."""

from collections.abc import Iterable
from difflib import get_close_matches


def close_names(given: str, known: Iterable[str]) -> str:
    """A sentence with the known names that are close to the given one."""
    close = get_close_matches(given, list(dict.fromkeys(known)), n=3)
    return f" Close: {', '.join(close)}." if close else ""
